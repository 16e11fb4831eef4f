"""Locality: what an edit left as it was."""

from expunge.core.measure import Certifier, Edit
from expunge.core.records import Certificate


class Locality(Certifier):
    """Count the parameters that an edit changed; all others are the base's, bit for bit."""

    def certify(self, edit: Edit) -> Certificate | None:
        """Value: changed tensors. None for guards, which change none."""
        if not edit.changed:
            return None
        return Certificate(
            name="locality",
            statement=f"{len(edit.changed)} of {edit.parameters} tensors differ; "
            "all others are the base model's, bit for bit.",
            value=float(len(edit.changed)),
            assumptions=("Unchanged weights still act on what changed ones send them.",),
        )
