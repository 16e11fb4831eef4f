"""Components of a concept in a prompt's embedding rows: found in a vocabulary, measured in a prompt, taken out.

Rows are of three kinds: words, closing rows (closing token and padding, which carry the sentence), the pooled text.
The opening token belongs to none and never moves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.ops.rows import pooled_rows
from expunge.ops.student import Learner
from expunge.patches.guard import PassGuard

KINDS = ("word", "tail", "pooled")
GAP = 0.1
"""Least distance in evidence between what is wholly suppressed and what is wholly spared."""


def principal(rows: Float[Tensor, "n d"], energy: float) -> Float[Tensor, "r d"]:
    """Orthonormal rows spanning the fewest leading directions that hold a share of the rows' squares, in float64.

    Uncentred: Y = U S V^T, the first r columns of V with sum_{i <= r} s_i^2 >= energy * sum s_i^2. Raises InputError
    for rows that are all zero and for an energy outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise InputError(f"energy is {energy}; legal: above 0, at most 1")
    found = torch.linalg.svd(rows.double(), full_matrices=False)
    share = found.S.square().cumsum(0) / found.S.square().sum()
    if not bool(found.S.any()):
        raise InputError("these rows do not differ, so they have no component; choose another target or anchor")
    return found.Vh[: int((share < energy - 1e-12).sum()) + 1]


@dataclass(frozen=True)
class Part:
    """What a concept is in one kind of row: an orthonormal basis B, and where its coordinates are to end."""

    basis: Float[Tensor, "r d"]
    centre: Float[Tensor, "d"]

    def held(self, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Give the part of rows that lies in the basis as seen from the centre, (e - m) B B^T, in float64."""
        return ((rows.double() - self.centre) @ self.basis.T) @ self.basis


@dataclass(frozen=True)
class Sense:
    """What tells, from one kind of row, a prompt that shows a concept."""

    axis: Float[Tensor, "d"]
    """Unit vector along the mean difference of the target's rows and the anchor's."""
    origin: Float[Tensor, "d"]
    """Mean of the anchor's rows, from which prompts are seen."""
    gate: Float[Tensor, "2"]
    """low, high: evidence at which suppression begins, and at which it is whole."""

    def evidence(self, cond: Condition, kind: str) -> Float[Tensor, "b"]:
        """Largest cosine of the angle between the axis and a row of the kind as seen from the anchor's, in float64.

        max over rows i of <e_i - o, axis> / |e_i - o|, o the origin, -1 without such a row; the anchor's side counts
        against.
        """
        off = cond.tokens.double() - self.origin
        cosine = (off @ self.axis) / off.norm(dim=-1).clamp(min=1e-12)
        return cosine.masked_fill(~row_kinds(cond)[kind], -1.0).amax(1)

    def alpha(self, cond: Condition, kind: str) -> Float[Tensor, "b"]:
        """How far the gate is open: clip((evidence - low) / (high - low), 0, 1)."""
        low, high = self.gate
        return ((self.evidence(cond, kind) - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class Component:
    """One concept: its parts by kind of row ("word", "tail", "pooled"), and its senses ("word", "tail")."""

    parts: Mapping[str, Part]
    senses: Mapping[str, Sense]

    def alpha(self, cond: Condition) -> Float[Tensor, "b"]:
        """How much is to be suppressed: what the sense says that is surest."""
        return torch.stack([sense.alpha(cond, kind) for kind, sense in self.senses.items()]).amax(0)

    def removed(self, cond: Condition, alpha: Float[Tensor, "b"]) -> Condition:
        """Take the parts out of every row but the opening one: e' = e - alpha (e - m) B B^T."""
        tokens = cond.tokens.double()
        for kind, mask in row_kinds(cond).items():
            share = alpha[:, None, None] * mask[..., None]
            tokens = tokens - share * self.parts[kind].held(cond.tokens)
        pooled = cond.pooled
        if pooled is not None:
            pooled = (pooled.double() - alpha[:, None] * self.parts["pooled"].held(pooled)).to(pooled.dtype)
        return replace(cond, tokens=tokens.to(cond.tokens.dtype), pooled=pooled)

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], index: int) -> "Component":
        """Rebuild the component that `Suppressor.tensors` stored under a number."""
        kinds = [kind for kind in KINDS if f"{index}.{kind}.basis" in tensors]
        parts = {kind: Part(tensors[f"{index}.{kind}.basis"], tensors[f"{index}.{kind}.centre"]) for kind in kinds}
        senses = {k: Sense(*(tensors[f"{index}.{k}.{name}"] for name in ("axis", "origin", "gate"))) for k in KINDS[:2]}
        return cls(parts, senses)


def component(
    model: Generator,
    targets: Sequence[str],
    anchors: Sequence[str],
    unrelated: Sequence[str],
    energy: float,
    reach: float,
    goal: Literal["anchor", "zero"],
) -> Component:
    """Find a concept in the rows of a vocabulary, each text faced by its anchor, and the gate that spares other texts.

    A sense's axis is the mean difference over the rows that differ at least half as much as the one that differs most,
    which in words are those of the phrase. low: the largest evidence of the unrelated, high = low + reach * (the
    vocabulary's median - low). Where these are less than GAP apart the target comes first: low is then GAP below the
    median. Raises InputError where target and anchor read alike, and for a reach outside (0, 1].
    """
    if not 0 < reach <= 1:
        raise InputError(f"reach is {reach}; legal: above 0, at most 1")
    target, anchor, others = (model.encode(texts) for texts in (targets, anchors, unrelated))
    parts, senses = {}, {}
    for kind in KINDS[: 2 if target.pooled is None else 3]:
        pairs = [facing_rows(target, anchor, row, kind) for row in range(len(target))]
        old, new = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        parts[kind] = Part(principal(old - new, energy), new.mean(0) if goal == "anchor" else torch.zeros_like(new[0]))
        if kind != "pooled":
            senses[kind] = _sense(kind, old, new, target, others, reach)
    return Component(parts, senses)


def _sense(
    kind: str,
    old: Float[Tensor, "n d"],
    new: Float[Tensor, "n d"],
    vocabulary: Condition,
    unrelated: Condition,
    reach: float,
) -> Sense:
    apart = (old - new).norm(dim=-1)
    told = apart >= apart.max() / 2
    axis = torch.nn.functional.normalize((old - new)[told].mean(0), dim=0)
    found = Sense(axis, new[told].mean(0), axis.new_tensor([0.0, 1.0]))
    middle, low = found.evidence(vocabulary, kind).median(), found.evidence(unrelated, kind).max()
    low = torch.minimum(low, middle - GAP)
    return replace(found, gate=torch.stack([low, low + reach * (middle - low)]))


def facing_rows(
    target: Condition, anchor: Condition, row: int, kind: str
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Rows of one kind of a text with those of its anchor: words from the last one back, closing rows from there on.

    An empty anchor has no words: its first closing row faces the last word.
    """
    if kind == "pooled":
        return pooled_rows(target)[row], pooled_rows(anchor)[row]
    ends = [max(int(cond.last[row]), 1) for cond in (target, anchor)]
    count = min(ends) if kind == "word" else target.tokens.shape[1] - 1 - max(ends)
    starts = [end + 1 - count if kind == "word" else end + 1 for end in ends]
    old, new = (cond.tokens[row, at : at + count] for cond, at in zip((target, anchor), starts, strict=True))
    return old, new


def row_kinds(cond: Condition) -> dict[str, Bool[Tensor, "b l"]]:
    """Which positions are words and which close the prompt; the opening token, at position 0, is neither."""
    place = torch.arange(cond.tokens.shape[1], device=cond.tokens.device)
    last = cond.last[:, None]
    return {"word": (place > 0) & (place <= last), "tail": place > last}


@dataclass(frozen=True)
class Suppressor(PassGuard):
    """Takes components out of the encoded prompt before sampling starts, and adds a learned correction where it does.

    e' = e - sum_k strength alpha_k (e - m_k) B_k B_k^T + (max_k alpha_k) D, concept after concept; D is zero in row 0.
    """

    components: tuple[Component, ...]
    strength: float
    adaptive: bool
    """False: alpha is 1 whatever the prompt."""
    correction: Float[Tensor, "l d"]

    def condition(self, cond: Condition) -> Condition:
        """Suppress; where alpha is 0 a prompt comes back bit for bit."""
        done, most = cond, torch.zeros(len(cond), dtype=torch.float64, device=cond.tokens.device)
        for part in self.components:
            alpha = part.alpha(cond) if self.adaptive else torch.ones_like(most)
            done, most = part.removed(done, self.strength * alpha), torch.maximum(most, alpha)
        return added(done, self.correction, most if self.strength else 0 * most)

    def tensors(self) -> dict[str, Tensor]:
        """Give all that it knows as tensors, `<concept>.<kind>.basis` and so on."""
        found = {"correction": self.correction}
        for index, part in enumerate(self.components):
            for kind, sense in part.senses.items():
                found |= {f"{index}.{kind}.{name}": value for name, value in vars(sense).items()}
            for kind, own in part.parts.items():
                found |= {f"{index}.{kind}.basis": own.basis, f"{index}.{kind}.centre": own.centre}
        return found


def added(cond: Condition, correction: Float[Tensor, "l d"], share: Float[Tensor, "b"]) -> Condition:
    """Add a share of a correction to every row but the opening one; differentiable in the correction."""
    shift = share[:, None, None] * torch.cat([torch.zeros_like(correction[:1]), correction[1:]]).double()
    return replace(cond, tokens=(cond.tokens.double() + shift).to(cond.tokens.dtype))


class TokenCorrection(Learner):
    """A learner whose only master is an additive correction of embedding rows; no weight of the model takes part."""

    def __init__(self, model: Generator, cond: Condition) -> None:
        self.model = model
        self.rows = torch.zeros(cond.tokens.shape[1:], device=cond.tokens.device, requires_grad=True)

    names: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The correction, "l d"."""
        return (self.rows,)

    def weights(self) -> dict[str, Tensor]:
        """Give no weights: the model stays as it is."""
        return {}
