"""Subspace: what an edit can do to prompts that have nothing of the target's rows."""

from expunge.core.measure import Certifier, Edit
from expunge.core.records import Certificate
from expunge.ops.reading import off_target


class Subspace(Certifier):
    """max over layers of ||(W' - W)(I - Q Q^T)||_2 / ||W||_2, Q spanning the target's rows."""

    def certify(self, edit: Edit) -> Certificate | None:
        """Value: that maximum. None unless only text-reading layers changed."""
        found = [value for reading in edit.readings for value in off_target(reading)]
        if not found:
            return None
        return Certificate(
            name="subspace",
            statement="An embedding orthogonal to the target's rows, whatever it says, is moved by at most "
            f"{max(found):.2g} of the largest output a layer gives for one of its length.",
            value=max(found),
            assumptions=(
                "Embeddings of real prompts share directions with the target's; for those see drift.",
                "It is about what text-reading layers emit, not about pictures.",
            ),
        )
