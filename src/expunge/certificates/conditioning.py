"""Conditioning: how far an edit is from throwing directions away."""

import torch

from expunge.core.measure import Certifier, Edit
from expunge.core.records import Certificate
from expunge.ops.reading import shared_matrix


class Conditioning(Certifier):
    """Smallest singular value and condition number of the M with W' = W M for every layer, as far as they hear it.

    Layers that hear the directions V alone hear of M no more than V^T M, and that is what is measured: M itself where
    they hear all. An embedding e with V^T M e = V^T c undoes the edit for c; the shortest is at most 1 / smallest times
    as long as c. At 0 some c have none.
    """

    def certify(self, edit: Edit) -> Certificate | None:
        """Value: the smallest singular value. None where the edit is not W M with one M per text route."""
        found = [shared_matrix(reading) for reading in edit.readings]
        spectra = [torch.linalg.svdvals(m) for m in found if m is not None]
        if not spectra or len(spectra) < len(found):
            return None
        low, high = min(float(s[-1]) for s in spectra), max(float(s[0]) for s in spectra)
        cond = f"{high / low:.2g}" if low > torch.finfo(torch.float32).eps * high else "beyond the weights' precision"
        return Certificate(
            name="conditioning",
            statement="Every text-reading layer is the old one times one matrix, which as far as layers hear it has "
            f"smallest singular value {low:.2g} and condition number {cond}.",
            value=low,
            assumptions=("A regular matrix can be undone by embeddings; that is the method's, not this program's.",),
        )
