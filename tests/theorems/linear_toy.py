"""A generator whose prediction is linear, eps(x, c) = A x + B e(c): what the methods do to it is known on paper."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import EditSite, Family, Generator, Group, State
from expunge.core.patch import Patch
from expunge.patches.shared import SharedPatch
from expunge.patches.weights import WeightPatch

CROSS, SELF = "unet.cross.weight", "unet.self.weight"


@dataclass(frozen=True)
class LinearToy:
    """A float64 generator on 4 × 2 × 2 latents; e(c) is the last word's embedding, "void" reads as the empty prompt.

    Its weights are float32 numbers, so a student starts exactly at the base. Window of 6 positions, width 8; position
    0 is the start token, shared by all prompts.
    """

    network: nn.Module
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = "linear-toy"
    family: Family = "unet"
    aliases: Mapping[str, str] = field(default_factory=lambda: {"void": ""})
    window: int = 6
    width: int = 8

    @classmethod
    def seeded(cls, seed: int = 0) -> "LinearToy":
        rng = torch.Generator().manual_seed(seed)
        unet = nn.Module()
        for name, inner in (("cross", 8), ("self", 16)):
            linear = nn.Linear(inner, 16, bias=False, dtype=torch.float64)
            linear.weight.data = (torch.randn(16, inner, generator=rng) / inner**0.5).double()
            unet.add_module(name, linear)
        network = nn.Module()
        network.add_module("unet", unet)
        return cls(network=network)

    def encode(self, prompts: Sequence[str]) -> Condition:
        words = [[self.aliases.get(word, word) for word in prompt.split()] for prompt in prompts]
        words = [[word for word in line if word] for line in words]
        last = torch.tensor([len(line) for line in words])
        mask = torch.arange(self.window)[None] <= last[:, None] + 1
        return Condition(tokens=torch.stack([self._rows(line) for line in words]), mask=mask, last=last)

    def _rows(self, words: list[str]) -> Tensor:
        """Row i depends on the words up to it, as in a causal text encoder."""
        rows = [("<start>",)]
        for i in range(1, self.window):
            rows.append((*words[:i], f"<end {max(0, i - len(words))}>"))
        return torch.stack([_normal(row, self.width) for row in rows])

    def check_prompt(self, text: str) -> None: ...

    def visit(self, cond: Condition, *, rng: torch.Generator, guidance_scale: float, steps: int = 50) -> State:
        b = len(cond)
        noise = torch.randn(b, 4, 2, 2, generator=rng, dtype=torch.float64)
        t = torch.rand(b, generator=rng)
        start = State(noise, t)
        u, c = self.predict(start, self.encode([""] * b)), self.predict(start, cond)
        return State(noise - 0.3 * (u + guidance_scale * (c - u)), t)

    def predict(self, state: State, cond: Condition) -> Tensor:
        a, b = self.weight(SELF), self.weight(CROSS)
        return (state.x.flatten(1) @ a.T + cond.subject @ b.T).reshape(state.x.shape)

    def distance(self, pred: Tensor, goal: Tensor) -> Tensor:
        return (pred - goal).square().flatten(1).mean(1)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance_scale: float,
        steps: int,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        raise InputError("the linear toy draws no images")

    def sites(self, group: Group) -> list[EditSite]:
        return (
            [EditSite(CROSS, self.weight(CROSS), "value", "tokens", (0, 16))] if group != "non_cross_attention" else []
        )

    def select(self, group: Group) -> dict[str, Tensor]:
        paths = {"non_cross_attention": [SELF], "all": [CROSS, SELF]}.get(group, [CROSS])
        return {path: self.weight(path) for path in paths}

    def weight(self, path: str) -> Tensor:
        return self.seen[path] if path in self.seen else self.network.get_parameter(path).detach()

    def view(
        self, *, weights: Mapping[str, Tensor] | None = None, guards: Sequence[Any] = (), hooks: Sequence[Any] = ()
    ) -> "LinearToy":
        return replace(self, seen={**self.seen, **(weights or {})})

    def weights_equal(self, other: "LinearToy") -> bool:
        return all(torch.equal(self.weight(path), other.weight(path)) for path in (CROSS, SELF))

    def absorb(self, images: Tensor) -> Tensor:
        return images

    def noised(self, clean: Tensor, *, rng: torch.Generator) -> State:
        raise InputError("the linear toy has no schedule")

    def as_eps(self, state: State, pred: Tensor) -> Tensor:
        return pred

    def as_clean(self, state: State, pred: Tensor) -> Tensor:
        return state.x - pred


def deltas(patch: Patch, model: Generator) -> Mapping[str, Tensor]:
    """What a closed-form patch adds to a model's weights, by path; layers that stay are left out."""
    plain = patch.materialised(model) if isinstance(patch, SharedPatch) else patch
    assert isinstance(plain, WeightPatch)
    return plain.deltas


def _normal(key: tuple[str, ...], width: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
