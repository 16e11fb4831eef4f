"""A generator that reads another sentence than it was given, before any encoder sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.condition import Condition
from expunge.core.generator import EditSite, Family, Generator, Group, Guard, Hook, State
from expunge.ops.gating import Gate, summary
from expunge.patches.guard import GuardPatch


class Reworded:
    """A view whose prompts, negative ones too, pass a gate first: a `Generator` around a `Generator`.

    Every text route is substituted at once, because all encoders read the twin sentence: a caught prompt and its twin
    are one input of one code path. What is asked in conditions, states or weights passes by.
    """

    def __init__(self, inner: Generator, gate: Gate) -> None:
        self.inner, self.gate = inner, gate
        self.name: str = inner.name
        self.family: Family = inner.family
        self._read: dict[str, Tensor] = {}

    def twin(self, text: str) -> str:
        """Give the sentence that is drawn for a prompt."""
        return self.gate.twin(text, self._summary)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode the twins."""
        return self.inner.encode([self.twin(prompt) for prompt in prompts])

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance_scale: float,
        steps: int,
        negative: Sequence[str] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Draw the twins."""
        return self.inner.generate(
            [self.twin(prompt) for prompt in prompts],
            seeds=seeds,
            guidance_scale=guidance_scale,
            steps=steps,
            negative=None if negative is None else [self.twin(prompt) for prompt in negative],
        )

    def view(
        self,
        *,
        weights: Mapping[str, Tensor] = MappingProxyType({}),
        guards: Sequence[Guard] = (),
        hooks: Sequence[Hook] = (),
    ) -> "Reworded":
        """Give a view of what is inside, behind the same gate."""
        return Reworded(self.inner.view(weights=weights, guards=guards, hooks=hooks), self.gate)

    @property
    def network(self) -> nn.Module:
        """The components of what is inside."""
        return self.inner.network

    def check_prompt(self, text: str) -> None:
        """Check the twin."""
        self.inner.check_prompt(self.twin(text))

    def visit(self, cond: Condition, *, rng: torch.Generator, guidance_scale: float, steps: int = 50) -> State:
        """Walk as what is inside does."""
        return self.inner.visit(cond, rng=rng, guidance_scale=guidance_scale, steps=steps)

    def predict(self, state: State, cond: Condition) -> Float[Tensor, "b ..."]:
        """Predict as what is inside does."""
        return self.inner.predict(state, cond)

    def distance(self, pred: Float[Tensor, "b ..."], goal: Float[Tensor, "b ..."]) -> Float[Tensor, "b"]:
        """Compare as what is inside does."""
        return self.inner.distance(pred, goal)

    def sites(self, group: Group) -> list[EditSite]:
        """List the sites of what is inside."""
        return self.inner.sites(group)

    def select(self, group: Group) -> dict[str, Tensor]:
        """Give the tensors of what is inside."""
        return self.inner.select(group)

    def weight(self, path: str) -> Tensor:
        """Give one tensor of what is inside."""
        return self.inner.weight(path)

    def absorb(self, images: Float[Tensor, "b 3 h w"]) -> Tensor:
        """Turn images into what the denoiser works on."""
        return self.inner.absorb(images)

    def noised(self, clean: Tensor, *, rng: torch.Generator) -> State:
        """Noise as what is inside does."""
        return self.inner.noised(clean, rng=rng)

    def as_eps(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert as what is inside does."""
        return self.inner.as_eps(state, pred)

    def as_clean(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert as what is inside does."""
        return self.inner.as_clean(state, pred)

    @torch.no_grad()
    def _summary(self, text: str) -> Float[Tensor, "d"]:
        """Read a span, alone in its batch so that its bits depend on nothing else; each once per view."""
        if text not in self._read:
            self._read[text] = summary(self.inner.encode([text]))[0]
        return self._read[text]


@dataclass(frozen=True)
class RewordPatch(GuardPatch):
    """A guard in front of the encoders: it needs the words, which no hook of the sampler sees."""

    gate: Gate = field(kw_only=True)

    def on(self, model: Generator) -> Generator:
        """Give a generator whose prompts pass the gate."""
        return Reworded(model, self.gate)
