"""Refinement and fusion in d × d: any number of rows and concepts at the memory of a few matrices.

Everything is in terms of moments of rows, Σ e eᵀ and Σ (goal − e) eᵀ, which concepts are added to one after the other.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.generator import Generator
from expunge.ops.ridge import Gram
from expunge.ops.rows import encode_parts
from expunge.patches.operator import SharedEdit

Factors = tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]
"""Down and up, A "r in" and B "out r": layers differ in height."""

Learned = tuple[Float[Tensor, "in in"], Mapping[str, Factors]]
"""What one concept brings: the moment of its rows, and its factors B A by path."""


def row_gram(rows: Float[Tensor, "n in"]) -> Float[Tensor, "in in"]:
    """Second moment of rows, Σ e eᵀ, in float64."""
    wide = rows.double()
    return wide.T @ wide


def row_shift(rows: Float[Tensor, "n in"], goals: Float[Tensor, "n in"]) -> Float[Tensor, "in in"]:
    """How rows are to move, Σ (g − e) eᵀ, in float64; exactly 0 where every goal is its row."""
    return (goals.double() - rows.double()).T @ rows.double()


def window_gram(model: Generator, texts: Sequence[str]) -> Float[Tensor, "in in"]:
    """Second moment of all rows of texts, padding included; 0 for no texts."""
    total = torch.zeros_like(row_gram(model.encode([""]).tokens[0]))
    for part in encode_parts(model, texts):
        total += row_gram(part.tokens.flatten(0, 1))
    return total


def refined(
    shift: Float[Tensor, "in in"], gram: Float[Tensor, "in in"], prior: Float[Tensor, "in in"], ridge: float
) -> SharedEdit:
    """Make every row give what its goal gave, in all layers at once: M = I + X (ridge I + G + P)⁻¹, X the shift.

    W' = W M = argmin Σ ‖W' e − W g‖² + Σ_prior ‖W' p − W p‖² + ridge ‖W' − W‖²_F, with G and P the moments of rows and
    prior. It is `shared_edit` for many rows.
    """
    eye = torch.eye(len(shift), dtype=torch.float64, device=shift.device)
    return SharedEdit(moves=eye, duals=Gram.of(gram + prior, ridge).solve(shift))


def fused(
    refined: SharedEdit,
    learned: Iterable[Learned],
    prior: Float[Tensor, "in in"],
    ridge: float,
) -> tuple[SharedEdit, dict[str, Factors]]:
    """Merge low-rank changes of refined weights into one change: a shared edit and factors, to be added up.

    With W' = W M refined, concept i's rows of moment G_i and change B_i A_i, and prior rows of moment P,
    W* = argmin Σ_i Σ_e ‖W* e − (W' + B_i A_i) e‖² + Σ_prior ‖W* p − W p‖² + ridge ‖W* − W'‖²_F
       = W (M + (I − M) P D⁻¹) + Σ_i B_i (A_i G_i D⁻¹),  D = ridge I + Σ_i G_i + P.
    Factors of all concepts are stacked: their product is the sum. Concepts are read once, one after the other: a
    hundred moments are never held together. Source: MACE (arXiv:2403.06135), fusion.
    """
    total, downs, ups = prior.clone(), dict[str, _Stack](), dict[str, _Stack]()
    for own, factors in learned:
        total += own
        for path, (down, up) in factors.items():
            downs.setdefault(path, _Stack()).add(down.double() @ own)
            ups.setdefault(path, _Stack()).add(up.double().T)
    gram = Gram.of(total, ridge)
    back = gram.solve(refined.duals @ prior)
    found = {path: (gram.solve(downs[path].rows()), ups[path].rows().T.contiguous()) for path in downs}
    return SharedEdit(moves=refined.moves, duals=refined.duals - back), found


class _Stack:
    """Rows put one behind the other into a block that doubles when it is full.

    A list of small tensors would settle in the holes that moments leave, d × d each, so that no later moment fits into
    them: memory would grow by a moment with every concept.
    """

    def __init__(self) -> None:
        self.block, self.count = torch.empty(0, 0), 0

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        end = self.count + len(rows)
        if end > len(self.block):
            block = rows.new_empty(max(end, 2 * self.count), rows.shape[1])
            if self.count:
                block[: self.count] = self.rows()
            self.block = block
        self.block[self.count : end] = rows
        self.count = end

    def rows(self) -> Float[Tensor, "m d"]:
        return self.block[: self.count]
