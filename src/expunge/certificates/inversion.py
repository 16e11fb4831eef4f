"""Inversion: whether some embedding brings the target's old keys and values back."""

from expunge.core.measure import Certifier, Edit
from expunge.core.records import Certificate
from expunge.ops.reading import inversions


class Inversion(Certifier):
    """min over target prompts and embeddings e of ||W' e - W c|| / ||W c - W a||, over all layers and rows together.

    0: free embeddings undo the edit exactly, as for every edit W M with a regular M; larger: none comes nearer.
    Source: our worst case of the closed-form inversion of keys and values.
    """

    def certify(self, edit: Edit) -> Certificate | None:
        """Value: that minimum. None unless only text-reading layers changed and some target differs from its anchor."""
        found = [pair for reading in edit.readings for pair in inversions(reading)]
        if not found:
            return None
        nearest, length = min(found)
        return Certificate(
            name="inversion",
            statement=f"Embeddings {length:.2g} times as long as the target's own bring its old keys and values back "
            f"to within {nearest:.2g} of the way to its anchor; none come nearer.",
            value=nearest,
            assumptions=(
                "Near 0, who may choose embeddings can undo the edit; elsewhere others may still draw the target.",
                "It is about what text-reading layers emit, not about pictures.",
            ),
        )
