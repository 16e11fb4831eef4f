"""Erasures in closed form, as parts that can be stored, solved together and taken out again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.ops.ridge import Gram, shared_edit
from expunge.patches.operator import Equations, SharedEdit
from expunge.patches.shared import Part

Pairs = Sequence[tuple[Float[Tensor, "_ in"], Float[Tensor, "_ in"]]]
"""Rows with the rows that they are sent to."""


@dataclass(frozen=True)
class Ask:
    """What is asked of one way of hearing the prompt: every concept's pairs, their gain, and the rows that are held."""

    pairs: Mapping[str, Pairs]
    """By concept."""
    gain: float
    held: Float[Tensor, "m in"]
    held_gain: float


def erasures(asks: Mapping[str, Ask], ridge: float, over: Mapping[str, Any]) -> tuple[Part, ...]:
    """Give one part for every concept, whose joint solve is `shared_edit` of all; asks by route.

    `over` says in words what regularises: ridge and held rows. One solved operator of all concepts together, which
    nothing can be taken out of, where the equations are not worth keeping: more rows than columns, or no ridge.
    """
    concepts = list(next(iter(asks.values())).pairs)
    rows = {route: [_rows(ask.pairs[name]) for name in concepts] for route, ask in asks.items()}
    few = all(sum(len(keys) for keys, _ in found) <= asks[route].held.shape[1] for route, found in rows.items())
    if not few or not ridge > 0:
        return (Part(targets=tuple(concepts), edits={route: solve(ask, ridge) for route, ask in asks.items()}),)
    grams = {route: Gram(ask.held, _gains(ask.held, ask.held_gain), ridge) for route, ask in asks.items()}
    return tuple(
        Part(
            targets=(name,),
            edits={
                route: Equations(keys, goals, _gains(keys, asks[route].gain), grams[route].solve(keys))
                for route in asks
                for keys, goals in (rows[route][index],)
            },
            over=over,
        )
        for index, name in enumerate(concepts)
    )


def solve(ask: Ask, ridge: float, *, aligned: bool = False) -> SharedEdit:
    """Solve for all concepts at once; aligned: one row of each factor for every row of the pairs, in order."""
    keys, goals = _rows([pair for pairs in ask.pairs.values() for pair in pairs])
    gains = _gains(keys, ask.gain), _gains(ask.held, ask.held_gain)
    return shared_edit(keys.double(), goals.double(), gains[0], ask.held.double(), gains[1], ridge, aligned=aligned)


def _rows(pairs: Pairs) -> tuple[Tensor, Tensor]:
    keys, goals = (torch.cat(side) for side in zip(*pairs, strict=True))
    wide = torch.promote_types(keys.dtype, torch.float32)  # as the encoder gave them: nothing is lost, half is saved
    return keys.to(wide), goals.to(wide)


def _gains(rows: Float[Tensor, "n in"], gain: float) -> Float[Tensor, "n"]:
    return rows.new_full(rows.shape[:1], gain, dtype=torch.float64)
