"""What the official closed-form scripts compute, layer by layer, in the weights' own precision and in our own words.

Written from the equations only: every layer sums two matrices of its own over all rows, as outer products one by one,
inverts the second explicitly and multiplies. The 2023 loop has every layer's outputs computed for each layer it edits,
as the script does; its two copies of all weights per call, its collecting of garbage and its pictures are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Outer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scales:
    """Weights of the loss: lam near the old weights, erase on the targets, preserve on what is retained."""

    lam: float
    erase: float
    preserve: float


def outer_sum(values: Tensor, rows: Tensor) -> Tensor:
    """Sum of v_i k_i^T over the rows of one text, each outer product formed."""
    return (values[:, :, None] @ rows[:, None, :]).sum(0)


def product(values: Tensor, rows: Tensor) -> Tensor:
    """The same sum as one matrix product: not what the script does, but quick enough to check thousands of texts."""
    return values.T @ rows


def uce_2025(weights: Sequence[Tensor], pairs: Sequence[Pair], kept: Sequence[Tensor], scales: Scales) -> list[Tensor]:
    """UCE of 2025, one row per text: pairs of (target's, anchor's), and what is retained."""
    edited = []
    for weight in weights:
        top, bottom = scales.lam * weight, scales.lam * torch.eye(weight.shape[1], dtype=weight.dtype)
        for old, new in pairs:
            top = top + scales.erase * torch.outer(weight @ new, old)
            bottom = bottom + scales.erase * torch.outer(old, old)
        for row in kept:
            top = top + scales.preserve * torch.outer(weight @ row, row)
            bottom = bottom + scales.preserve * torch.outer(row, row)
        edited.append(top @ torch.linalg.inv(bottom))
    return edited


def uce_2023(
    weights: Sequence[Tensor],
    pairs: Sequence[Pair],
    kept: Sequence[Tensor],
    scales: Scales,
    layers: Sequence[int] | None = None,
    outer: Outer = outer_sum,
) -> list[Tensor]:
    """UCE of 2023, all rows of every text, pairs already aligned; `layers` are those edited, by default all."""
    edited = []
    for layer in range(len(weights)) if layers is None else layers:
        top, bottom = start(weights[layer], scales)
        for old, new in pairs:
            top = top + scales.erase * outer(outputs(weights, new)[layer], old)
            bottom = bottom + scales.erase * outer(old, old)
        for rows in kept:
            more_top, more_bottom = retained(weights, rows, layer, scales, outer)
            top, bottom = top + more_top, bottom + more_bottom
        edited.append(top @ torch.linalg.inv(bottom))
    return edited


def start(weight: Tensor, scales: Scales) -> Pair:
    """What a layer's two sums begin with."""
    return scales.lam * weight, scales.lam * torch.eye(weight.shape[1], dtype=weight.dtype)


def outputs(weights: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Every layer's outputs for the rows of one text."""
    return [rows @ weight.T for weight in weights]


def retained(weights: Sequence[Tensor], rows: Tensor, layer: int, scales: Scales, outer: Outer = outer_sum) -> Pair:
    """One retained text's part of one layer's two sums; the scripts compute all layers' outputs for it."""
    values = outputs(weights, rows)[layer]
    return scales.preserve * outer(values, rows), scales.preserve * outer(rows, rows)


def residual(old: Sequence[Tensor], now: Sequence[Tensor], rows: Tensor, penalty: float) -> Tensor:
    """RECE's embeddings that make the edited layers give again what the old ones gave for `rows`."""
    inner = penalty * torch.eye(rows.shape[1], dtype=rows.dtype)
    right = torch.zeros_like(inner)
    for before, after in zip(old, now, strict=True):
        inner = inner + after.T @ after
        right = right + after.T @ before
    return rows @ (torch.linalg.inv(inner) @ right).T


def rece(
    old: Sequence[Tensor],
    now: Sequence[Tensor],
    pairs: Sequence[Pair],
    kept: Sequence[Tensor],
    scales: Scales,
    *,
    penalty: float,
    epochs: int,
) -> list[Tensor]:
    """RECE from UCE's weights `now`: residual embeddings of every target, then a step of 2023's UCE against them."""
    current = list(now)
    for _ in range(epochs):
        found = [(residual(old, current, rows, penalty), goal) for rows, goal in pairs]
        current = uce_2023(current, found, kept, scales)
    return current


@dataclass(frozen=True)
class Sentences:
    """What MACE reads of one concept, "prompts rows in": sentences about it, the same about its anchor; its adapter."""

    old: Tensor
    new: Tensor
    factors: Sequence[Pair]
    """Down "1 in" and up "out 1" of every layer."""


def stacked(values: Tensor, contexts: Tensor) -> Tensor:
    """Sum over positions of values "p r out" times contexts "p r in": one product a position, all kept until summed."""
    return (values.permute(1, 2, 0) @ contexts.permute(1, 0, 2)).sum(0)


def mace(weights: Sequence[Tensor], concepts: Sequence[Sentences], prior: Tensor, ridge: float) -> list[Tensor]:
    """MACE's two closed forms, layer by layer: refinement of all concepts, then fusion of their adapters.

    prior: second moment of what is held, its targets those of the original weights in both.
    """
    edited = []
    for layer, weight in enumerate(weights):
        eye = torch.eye(weight.shape[1], dtype=weight.dtype)
        top, bottom = ridge * weight + weight @ prior, ridge * eye + prior
        for concept in concepts:
            top = top + stacked(concept.new @ weight.T, concept.old)
            bottom = bottom + stacked(concept.old, concept.old)
        refined = top @ torch.linalg.inv(bottom)
        top, bottom = ridge * refined + weight @ prior, ridge * eye + prior
        for concept in concepts:
            down, up = concept.factors[layer]
            top = top + stacked(concept.old @ (refined + up @ down).T, concept.old)
            bottom = bottom + stacked(concept.old, concept.old)
        edited.append(top @ torch.linalg.inv(bottom))
    return edited
