"""Projections of embedding rows that no embedding undoes: closed form, in float64.

Rows are embeddings ("n in"), layers are "out in" and read a row k as W_l k. All of it is measured in what the layers
make of a row: L is any matrix with L^T L = sum_l W_l^T W_l, so |L x|^2 = sum_l |W_l x|^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.ops.ridge import output_gram
from expunge.patches.operator import SharedEdit

# Below this share of the largest a direction of the kept rows, or in squares of the outputs, is rounding.
_CUT = 1e-12


@dataclass(frozen=True)
class Projection:
    """W' = W P with P = I - U^T V L, V L U^T = I: P P = P, rank in - k; one P for every layer.

    P x = x wherever V L x = 0, and V L P = 0: nothing of what `blind` spans is written any more, whatever is read.
    """

    edit: SharedEdit
    """P as an edit: moves -U, duals V L."""
    heard: Float[Tensor, "h in"]
    """L, of full rank: what all layers together hear of a row."""
    blind: Float[Tensor, "k h"]
    """Orthonormal basis of V's rows."""

    def floor(self, rows: Float[Tensor, "n in"]) -> Float[Tensor, "n"]:
        """Give for each row c the minimum over all rows e of sum_l |W_l P e - W_l c|^2, zero where c can be written.

        L P e runs through exactly the vectors with blind · (L P e) = 0, so the minimum is |blind · L c|^2.
        """
        return (rows.double() @ self.heard.T @ self.blind.T).square().sum(1)


def heard_map(weights: Sequence[Float[Tensor, "_ in"]]) -> Float[Tensor, "h in"]:
    """Give L with L^T L = sum_l W_l^T W_l, without the directions that no layer hears; float64."""
    values, vectors = torch.linalg.eigh(output_gram(weights))
    kept = values > _CUT * values[-1]
    return (values[kept].sqrt() * vectors[:, kept]).T


def off_span(rows: Float[Tensor, "n in"], heard: Float[Tensor, "h in"]) -> Float[Tensor, "h f"]:
    """Give an orthonormal basis, in columns, of all heard directions that are orthogonal to what every row is heard as.

    It is the room in which something can be removed while every row, and every mixture of them, is kept exactly.
    """
    found = torch.linalg.svd(rows.double() @ heard.T, full_matrices=True)
    kept = int((found.S / found.S[:1] > _CUT).sum())
    return found.Vh[kept:].T


def projection(
    moves: Float[Tensor, "n in"],
    heard: Float[Tensor, "h in"],
    room: Float[Tensor, "h f"],
    other: Float[Tensor, "m in"],
    *,
    cut: float,
    ridge: float,
    through_room: bool = False,
) -> Projection:
    """Remove the leading directions of `moves` along themselves, keep all that is orthogonal to `room` exactly.

    U holds the k mixtures of moves whose parts in the room are principal ones of at least `cut`, and
    V = argmin mean over other rows of |V L x|^2 / scale + ridge |V|^2 over V in the room with V L U^T = I, where scale
    is the mean square of a component of L x: a small ridge spares other rows, a large one makes `floor` largest.
    through_room removes of U only the part in the room, so that no row grows by it; a row is then not sent along its
    whole move. The constraint is LEACE's (arXiv:2306.03819), with kept rows in place of a distribution.
    """
    left, size, right = torch.linalg.svd(moves.double() @ heard.T @ room, full_matrices=False)
    leading = size >= cut
    along = left[:, leading].T @ moves.double()
    if through_room:
        inside = size[leading, None] * right[leading] @ room.T
        along = inside @ (heard / heard.square().sum(1, keepdim=True))  # the rows of L are orthogonal
    goals = along @ heard.T
    seen = other.double() @ heard.T
    scale = seen.square().mean().clamp(min=torch.finfo(torch.float64).tiny)
    spread = (seen @ room).T @ (seen @ room) / (len(seen) * scale)
    spread.diagonal().add_(ridge)
    part = room @ torch.cholesky_solve((goals @ room).T, torch.linalg.cholesky(spread))
    duals = torch.linalg.solve(goals @ part, part.T)
    return Projection(SharedEdit(moves=-along, duals=duals @ heard), heard, torch.linalg.qr(duals.T).Q.T)
