"""Low-rank factors of a given change, and what they lose."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a weight's change, D = U diag(s) V with s falling.

    A convolution "out in kh kw" is read as the matrix "out in·kh·kw", as LoRA files do.
    """

    up: Float[Tensor, "out k"]
    values: Float[Tensor, "k"]
    down: Float[Tensor, "k n"]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, delta: Float[Tensor, "out ..."]) -> "Spectrum":
        """Decompose a change in float32 or wider."""
        wide = torch.promote_types(delta.dtype, torch.float32)
        up, values, down = torch.linalg.svd(delta.detach().to(wide).flatten(1), full_matrices=False)
        return cls(up, values, down, tuple(delta.shape))

    def factors(self, rank: int) -> tuple[Float[Tensor, "r ..."], Float[Tensor, "out r ..."]]:
        """Give A = V_r and B = U_r diag(s_r): no B A of this rank is closer in Frobenius norm (Eckart and Young).

        Beyond the last singular value both are zeros, so that all layers of a file can share one rank.
        """
        kept = min(rank, len(self.values))
        down = self.down.new_zeros(rank, self.down.shape[1])
        up = self.up.new_zeros(self.up.shape[0], rank)
        down[:kept], up[:, :kept] = self.down[:kept], self.up[:, :kept] * self.values[:kept]
        return shaped(down, up, self.shape)


def shaped(
    down: Float[Tensor, "r n"], up: Float[Tensor, "out r"], shape: tuple[int, ...]
) -> tuple[Float[Tensor, "r ..."], Float[Tensor, "out r ..."]]:
    """Give factors of a weight's shape: A "r in" and B "out r", or A "r in kh kw" and B "out r 1 1"."""
    ones = (1,) * (len(shape) - 2)
    return down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *ones)


def enough(spectra: Iterable[Spectrum], tolerance: float) -> int:
    """Give the smallest common rank with ‖D − B A‖ <= tolerance · ‖D‖ in Frobenius norm over all changes together."""
    squares = [spectrum.values.double().square() for spectrum in spectra]
    total, rank = float(sum(square.sum() for square in squares)), 1
    while sum(float(square[rank:].sum()) for square in squares) > tolerance**2 * total:
        rank += 1
    return rank
