"""Residual: how far the target's outputs still are from the anchor's."""

from expunge.core.measure import Certifier, Edit
from expunge.core.records import Certificate
from expunge.ops.reading import residuals


class Residual(Certifier):
    """max over layers and target prompts of ||W' c - W a|| / ||W c - W a||, c a prompt's rows, a its anchor's.

    Rows run from the last word to the window's end. 0: every text-reading layer takes the target for its anchor; 1 or
    so: nothing was done. Source: the objective of UCE (arXiv:2308.14761) as a worst case.
    """

    def certify(self, edit: Edit) -> Certificate | None:
        """Value: that maximum. None unless only text-reading layers changed and some target differs from its anchor."""
        found = [value for reading in edit.readings for value in residuals(reading)]
        if not found:
            return None
        return Certificate(
            name="residual",
            statement=f"For the target's own prompts every text-reading layer ends within {max(found):.2g} of the "
            "distance it had from the anchor.",
            value=max(found),
            assumptions=(
                "These prompts, as they are written; other words for the target are not among them.",
                "It is about what text-reading layers emit, not about pictures, and no claim about attacks.",
            ),
        )
