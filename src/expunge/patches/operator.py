"""One matrix M for every layer that reads the text, W' = W M: as factors, and as the equations it solves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import InputError

# Bytes of a weight edited at a time, so that a low-rank edit reads it from memory once and then from the cache.
_CACHE = 2**20
# Equations over one regulariser have symmetric products of rows and reads, up to the rounding of float32 encoders.
_SYMMETRIC = 1e-3
_ROWS = ("keys", "goals", "reads")


@dataclass(frozen=True)
class SharedEdit:
    """One operator M that edits every layer reading the text: W' = W M, M = I + moves^T duals.

    Its factors take 2 r in numbers; rank(W' - W) <= r, the number of erased rows or the width if that is less.
    Source: UCE (arXiv:2308.14761, eq. 7), written as a rank-r update.
    """

    moves: Float[Tensor, "r in"]
    """Gain-weighted differences goal - key; the identity where there are more of them than columns."""
    duals: Float[Tensor, "r in"]
    """D^-1 key; (moves^T keys) D^-1 where moves is the identity."""

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Give W' - W in float64: (W moves^T) duals."""
        return (weight.double() @ self.moves.T) @ self.duals

    def apply_(self, weights: Sequence[Float[Tensor, "_ in"]]) -> None:
        """Overwrite every weight by W M, computed in its own precision (float32 at least) from factors in float64.

        One pass reads a weight, one adds to it. In float32 the error is that of rounding M - I once, as the left
        factor is orthonormal: nothing large cancels.
        """
        for wide in {torch.promote_types(weight.dtype, torch.float32) for weight in weights}:
            right, left = self._factors
            right, left = right.to(wide), None if left is None else left.to(wide)
            for weight in weights:
                if torch.promote_types(weight.dtype, torch.float32) == wide:
                    _move(weight, left, right)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor | None]:
        """Right and left factor of M - I, the left orthonormal; or M - I itself and None where that is cheaper."""
        if 2 * self.moves.shape[0] >= self.moves.shape[1]:
            return self.moves.T @ self.duals, None
        left, upper = torch.linalg.qr(self.moves.T)
        return upper @ self.duals, left

    def matrix(self) -> Float[Tensor, "in in"]:
        """Give M in float64, for diagnostics: c -> M^-1 c undoes the edit wherever M is regular."""
        eye = torch.eye(self.moves.shape[1], dtype=torch.float64, device=self.moves.device)
        return eye + self.moves.T @ self.duals

    def then(self, later: "SharedEdit") -> "SharedEdit":
        """Give both edits as one, W M M': `later` was solved for the weights this one leaves."""
        moves = later.moves + (later.moves @ self.duals.T) @ self.moves
        return SharedEdit(moves=torch.cat([self.moves, moves]), duals=torch.cat([self.duals, later.duals]))


@dataclass(frozen=True)
class Equations:
    """What one erasure asks of M, and what its regulariser makes of the rows: enough to solve it with others again.

    M = argmin sum gain |M k - g|^2 + |(M - I) R^(1/2)|^2, R = ridge I + sum over retained rows; reads are R^-1 k.
    """

    keys: Float[Tensor, "r in"]
    goals: Float[Tensor, "r in"]
    gain: Float[Tensor, "r"]
    reads: Float[Tensor, "r in"]


def joint(parts: Sequence[Equations]) -> SharedEdit:
    """Solve all erasures over one regulariser at once, from their rows alone, in float64: order does not matter.

    M = I + X (R + K^T G K)^-1 with rows K of all, G their gains, X = sum gain (g - k) k^T; and by Woodbury
    (R + K^T G K)^-1 K^T G = R^-1 K^T G^(1/2) (I + G^(1/2) K R^-1 K^T G^(1/2))^-1 G^(1/2), an r x r solve without R.
    Raises InputError if the products K R^-1 K^T are not symmetric: then the parts had different regularisers.
    """
    keys, goals, reads = (torch.cat([getattr(part, name) for part in parts]).double() for name in _ROWS)
    root = torch.cat([part.gain for part in parts]).double().sqrt()
    inner = keys @ reads.T
    if not bool((inner - inner.T).norm() <= _SYMMETRIC * inner.norm()):
        raise InputError(
            "these erasures were not solved over the same ridge and retained rows; they have no joint solve"
        )
    inner = root[:, None] * (inner + inner.T) / 2 * root
    inner.diagonal().add_(1)
    duals = torch.cholesky_solve(root[:, None] * reads, torch.linalg.cholesky(inner))
    return SharedEdit(moves=root[:, None] * (goals - keys), duals=duals)


def _move(weight: Tensor, left: Tensor | None, right: Tensor) -> None:
    """Add W left right to W in place, in the factors' precision."""
    old = weight.to(right.dtype)
    if left is None:
        old.add_(old @ right)
    else:
        for part in old.split(max(1, _CACHE // (old.shape[1] * old.element_size()))):
            part.addmm_(part @ left, right)
    if old is not weight:
        weight.copy_(old)
