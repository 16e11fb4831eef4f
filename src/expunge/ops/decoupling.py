"""Shifts of weights that other texts do not feel, what they are learned by, and when to stop.

Rows are embeddings ("n in"), a weight W is "out in" and reads a row k as W k. A shift w S whose directions S are
orthogonal to a row leaves W k as it was, whatever w is: shifts of several concepts do not meet.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State
from expunge.ops.student import Learner
from expunge.ops.trajectory import predict_each
from expunge.patches.weights import WeightPatch, added

# Singular values below this share of the largest are the rounding of encoders that write float32.
_CUT = 1e-6
# Losses seen before a mean of them is trusted.
_PATIENCE = 10


def free_basis(rows: Float[Tensor, "n in"], tolerance: float = 0.0) -> Float[Tensor, "f in"]:
    """Give an orthonormal basis S of the directions that no row has a part in, S k = 0 for every row k; float64.

    tolerance: singular values of the rows up to this share of the largest count as none, so that |S rows^T|_2 <=
    tolerance |rows|_2 and f grows. Source: SepME (arXiv:2402.05947), solved there by exact elimination.
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance is {tolerance}; legal: 0 to below 1")
    # Only the rows' Gram matters, so the triangle of a QR decomposition stands for any number of them.
    found = torch.linalg.svd(torch.linalg.qr(rows.double(), mode="r").R, full_matrices=True)
    held = int((found.S / found.S[:1] > max(tolerance, _CUT)).sum())
    return found.Vh[held:]


class ShiftStudent(Learner):
    """W' = W + sum_k w_k S_k for every matrix: one shift per concept, w_k "out f_k" zero at the start.

    The bases are frozen and shared by all matrices. With orthonormal S a step on w is a step of the same size on W'.
    """

    def __init__(self, model: Generator, paths: Sequence[str], bases: Sequence[Float[Tensor, "_ in"]]) -> None:
        """Lay shifts over the matrices at `paths`; raises InputError where a basis has another width."""
        self.model = model
        self._bases = [basis.double() for basis in bases]
        self._factors: dict[str, list[Tensor]] = {}
        for path in paths:
            weight = model.weight(path)
            for basis in bases:
                if weight.ndim != 2 or weight.shape[1] != basis.shape[1]:
                    raise InputError(f"{path} has shape {tuple(weight.shape)}; legal: out x {basis.shape[1]}")
            zeros = [torch.zeros(weight.shape[0], len(basis), device=weight.device) for basis in bases]
            self._factors[path] = [part.requires_grad_() for part in zeros]

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the shifted matrices; each has a w for every basis in `parameters`, in order."""
        return tuple(self._factors)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The w."""
        return tuple(part for parts in self._factors.values() for part in parts)

    def shifts(self) -> dict[str, Tensor]:
        """Give the sum of w_k S_k by path, in float32."""
        return {path: self._sum(parts, torch.float32) for path, parts in self._factors.items()}

    def weights(self) -> dict[str, Tensor]:
        """Give W + sum_k w_k S_k by path, in the base's dtype."""
        return {path: added(self.model.weight(path), shift, path) for path, shift in self.shifts().items()}

    @torch.no_grad()
    def patch(self) -> WeightPatch:
        """Freeze what was learned, multiplied out in float64; matrices whose w are still zero are left out."""
        moved = {path: parts for path, parts in self._factors.items() if any(bool(part.any()) for part in parts)}
        return WeightPatch({path: self._sum(parts, torch.float64).float() for path, parts in moved.items()})

    def _sum(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        products = [part.to(dtype) @ basis.to(dtype) for part, basis in zip(parts, self._bases, strict=True)]
        return torch.stack(products).sum(0)


def correlation(view: Generator, base: Generator, state: State, cond: Condition, plain: Condition) -> Float[Tensor, ""]:
    """Mean over elements of r r*: r = eps(x, t, cond) - eps(x, t, plain) of a view, r* of its frozen base.

    In noise, whatever the model predicts. It is not normalised: mean r*^2 where nothing has changed, 0 where the view's
    guidance is orthogonal to the old one, negative beyond. Source: SepME (arXiv:2402.05947).
    """
    with torch.no_grad():
        was = [base.as_eps(state, pred) for pred in predict_each(base, state, (cond, plain))]
    now = [base.as_eps(state, pred) for pred in predict_each(view, state, (cond, plain))]
    return ((now[0] - now[1]) * (was[0] - was[1])).mean()


def balance(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Weights that make all terms of a sum equally large: max |x| / |x_i|, without gradient; 1 for a single term."""
    size = values.detach().abs()
    return size.max() / size.clamp(min=torch.finfo(size.dtype).tiny)


class Settling:
    """Tell when a loss has come down: m <- 0.9 m + 0.1 x, m the first x at the start, is below a bound.

    The first ten losses never settle it, so a loss that is below from the start ends at the eleventh.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.state = torch.zeros(2, dtype=torch.float64)
        """The mean, and how many losses were seen."""

    def see(self, value: float) -> None:
        """Take in one more loss."""
        mean, count = self.state.tolist()
        self.state.copy_(torch.tensor([0.9 * mean + 0.1 * value if count else value, count + 1], dtype=torch.float64))

    @property
    def done(self) -> bool:
        """Whether the mean is below the bound and trusted."""
        mean, count = self.state.tolist()
        return count > _PATIENCE and mean < self.bound
