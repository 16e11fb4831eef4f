"""Closed-form weight edits: ridge regression towards the old weights, in float64.

Rows are embeddings ("n in"), a weight W is "out in" and reads a row k as W k. Everything here solves

    min over W'  of  sum_i gain_i |W' k_i - v_i|^2  +  ridge |W' - W|_F^2 .

With D = ridge I + sum_i gain_i k_i k_i^T the answer is W' = W + sum_i gain_i (v_i - W k_i) (D^-1 k_i)^T. D does not
depend on W, so all layers that read the same text share one factorisation. No inverse is ever formed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import InputError
from expunge.patches.operator import SharedEdit

# Directions below this share of D's largest eigenvalue count as absent when there is no ridge to fill them in.
_CUT = 1e-10
# Rows turned to float64 at a time: 25 MB at width 768, so that 100 000 rows need no second copy.
_CHUNK = 4096
# Column blocks of a symmetric product: only those on and below the diagonal are multiplied, 5/8 of the work.
_BLOCKS = 4


class Gram:
    """A factorised D = ridge I + sum_i gain_i k_i k_i^T.

    Few rows (n <= in / 2, ridge > 0): Woodbury, n x n Cholesky. Many rows: in x in Cholesky. Without ridge:
    eigenvectors; InputError where some are below 1e-10 of the largest, because nothing then says what their directions
    become. Equal rows are merged where that may make them few; in a sum over many it changes nothing. moment: rows
    already summed up to theirs, added to D.
    """

    def __init__(
        self,
        rows: Float[Tensor, "n in"],
        gain: Float[Tensor, "n"],
        ridge: float,
        moment: Float[Tensor, "in in"] | None = None,
    ) -> None:
        if ridge < 0 or not bool((gain >= 0).all()):
            least = gain.min().item() if len(gain) else "none"
            raise InputError(f"ridge {ridge} and gains (smallest {least}) must not be negative")
        self.ridge = ridge
        if 0 < rows.shape[0] <= 4 * rows.shape[1]:
            rows, gain = _merged(rows.double(), gain.double())
        self._wood = moment is None and ridge > 0 and rows.shape[0] <= rows.shape[1] // 2
        if self._wood:
            self._rows = rows.double() * gain.double().sqrt()[:, None]
        inner = self._rows @ self._rows.T if self._wood else _square(rows, gain)
        if moment is not None:
            inner = inner + moment.double()
        inner.diagonal().add_(ridge)
        if ridge > 0:
            self._factor = torch.linalg.cholesky(inner)
        else:
            self._values, self._factor = _spectrum(inner)

    @classmethod
    def of(cls, moment: Float[Tensor, "in in"], ridge: float) -> "Gram":
        """Factorise ridge I + moment: of rows already summed up, sum_i gain_i k_i k_i^T."""
        return cls(moment[:0], moment.new_zeros(0), ridge, moment)

    def solve(self, rows: Float[Tensor, "r in"]) -> Float[Tensor, "r in"]:
        """Give D^-1 k for every row k, in float64."""
        right = rows.double().T
        if self._wood:
            z = self._rows
            return ((right - z.T @ torch.cholesky_solve(z @ right, self._factor)) / self.ridge).T
        if self.ridge > 0:
            return torch.cholesky_solve(right, self._factor).T
        return (self._factor @ ((self._factor.T @ right) / self._values[:, None])).T


def shared_edit(
    keys: Float[Tensor, "r in"],
    goals: Float[Tensor, "r in"],
    gain: Float[Tensor, "r"],
    retain: Float[Tensor, "m in"],
    retain_gain: Float[Tensor, "m"],
    ridge: float,
    *,
    aligned: bool = False,
) -> SharedEdit:
    """Send every key to what its goal gave, hold the retained rows, stay near the old weights.

    Minimizes sum gain |W' k - W g|^2 + sum retain_gain |W' p - W p|^2 + ridge |W' - W|^2 for all W at once. Retained
    rows enter D only: if no key moves, nothing changes, exactly. With more keys than columns the factors are the
    identity and X D^-1, X = sum gain (g - k) k^T, unless `aligned` asks for one row of each factor per key.
    """
    gram = Gram(torch.cat([keys, retain]), torch.cat([gain, retain_gain]), ridge)
    width = keys.shape[1]
    if aligned or keys.shape[0] <= width:
        moves = gain.double()[:, None] * (goals.double() - keys.double())
        return SharedEdit(moves=moves, duals=gram.solve(keys))
    cross = keys.new_zeros(width, width, dtype=torch.float64)
    for key, goal, weight in zip(*(side.split(_CHUNK) for side in (keys, goals, gain)), strict=True):
        cross.addmm_((weight[:, None] * (goal.double() - key.double())).T, key.double())
    eye = torch.eye(width, dtype=torch.float64, device=keys.device)
    return SharedEdit(moves=eye, duals=gram.solve(cross))


def output_gram(weights: Sequence[Float[Tensor, "_ in"]]) -> Float[Tensor, "in in"]:
    """Give S = sum_l W_l^T W_l in float64: x^T S x is the squared size of what all layers make of a row x.

    Raises InputError for weights that are not finite.
    """
    gram = sum_products(weights, weights)
    if not bool(gram.isfinite().all()):
        raise InputError("a layer that reads the prompt holds weights that are not finite")
    return gram


def sum_products(
    left: Sequence[Float[Tensor, "_ in"]], right: Sequence[Float[Tensor, "_ in"]]
) -> Float[Tensor, "in in"]:
    """Give sum_l A_l^T B_l in float64, layer by layer: all of them at once may not fit."""
    total = left[0].new_zeros(left[0].shape[1], left[0].shape[1], dtype=torch.float64)
    for a, b in zip(left, right, strict=True):
        total.addmm_(a.double().T, b.double())
    return total


def residual_rows(
    rows: Float[Tensor, "n in"],
    gram: Float[Tensor, "in in"],
    edit: SharedEdit,
    penalty: float,
    pull: Float[Tensor, "n in"] | None = None,
) -> Float[Tensor, "n in"]:
    """Find the embeddings that make the edited layers W M give again what the old ones gave for `rows`, in float64.

    c' = argmin sum_l |W_l M c' - W_l c|^2 + penalty |c' - pull|^2 = (penalty I + M^T S M)^-1 (M^T S c + penalty pull),
    with S = `output_gram` of the old layers and pull 0 if not given. Without penalty and with S and M regular it is
    M^-1 c, exactly. Source: RECE (arXiv:2407.12383), in d x d instead of layer by layer.
    """
    if penalty < 0:
        raise InputError(f"penalty {penalty} must not be negative")
    m = edit.matrix()
    half = gram @ m
    right = rows.double() @ half
    if pull is not None:
        right = right + penalty * pull.double()
    inner = m.T @ half
    if penalty > 0:
        inner.diagonal().add_(penalty)
        return torch.cholesky_solve(right.T, torch.linalg.cholesky(inner)).T
    values, vectors = _spectrum((inner + inner.T) / 2)
    return (vectors @ ((vectors.T @ right.T) / values[:, None])).T


def ridge_edit(
    weight: Float[Tensor, "out in"],
    keys: Float[Tensor, "n in"],
    values: Float[Tensor, "n out"],
    gain: Float[Tensor, "n"],
    ridge: float,
) -> Float[Tensor, "out in"]:
    """Give the weight that sends keys to values and stays near the old one, in float64.

    argmin over W' of sum gain |W' k - v|^2 + ridge |W' - W|^2. For values that are not the old weight's own outputs;
    where they are, `shared_edit` serves all layers with one solve.
    """
    old = weight.double()
    wrong = gain.double()[:, None] * (values.double() - keys.double() @ old.T)
    return old + wrong.T @ Gram(keys, gain, ridge).solve(keys)


def _square(rows: Tensor, gain: Tensor) -> Tensor:
    """Give sum_i gain_i k_i k_i^T in float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, weight in zip(rows.split(_CHUNK), gain.split(_CHUNK), strict=True):
        _add_square(total, part.double() * weight.double().sqrt()[:, None])
    return _mirrored(total)


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the blocks of `total` on and below its diagonal."""
    width = rows.shape[1]
    step = -(-width // _BLOCKS)
    for start in range(0, width, step):
        total[start:, start : start + step].addmm_(rows[:, start:].T, rows[:, start : start + step])


def _mirrored(total: Tensor) -> Tensor:
    """Fill what is above the diagonal from what is below."""
    return total.tril() + total.tril(-1).T


def _merged(rows: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Take equal rows together, their gains added: every prompt repeats the opening token."""
    unique, where = torch.unique(rows, dim=0, return_inverse=True)
    weight = torch.zeros(unique.shape[0], dtype=torch.float64, device=rows.device).index_add_(0, where, gain)
    return unique, weight


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > _CUT * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    if not bool(kept.all()):
        raise InputError(
            f"the solve is singular: without ridge (or penalty) its rows span {int(kept.sum())} of {len(values)} "
            "directions; legal: a ridge (or penalty) above 0, or more retained rows"
        )
    return values, vectors
