"""Drift: how far the outputs of retained prompts moved."""

from expunge.core.measure import Certifier, Edit
from expunge.core.records import Certificate
from expunge.ops.reading import drifts


class Drift(Certifier):
    """max over layers and retained prompts, the empty one among them, of ||W' p - W p|| / ||W p|| over all rows p."""

    def certify(self, edit: Edit) -> Certificate | None:
        """Value: that maximum. None unless only text-reading layers changed."""
        found = [value for reading in edit.readings for value in drifts(reading)]
        if not found:
            return None
        return Certificate(
            name="drift",
            statement=f"For the {len(edit.request.retain)} retained concepts and the empty prompt no text-reading "
            f"layer moves by more than {max(found):.2g} of its output.",
            value=max(found),
            assumptions=(
                "These prompts, as they are written.",
                "It is about what text-reading layers emit, not about pictures.",
            ),
        )
