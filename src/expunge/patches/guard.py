"""Interventions at inference time, as patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.generator import Generator, Guard, Hook, State


class PassGuard:
    """The guard that changes nothing: the base of guards that override one point."""

    def condition(self, cond: Condition) -> Condition:
        """Give the encoded prompt back."""
        return cond

    def combine(
        self,
        model: Generator,
        state: State,
        cond: Float[Tensor, "b ..."],
        uncond: Float[Tensor, "b ..."],
        scale: float,
    ) -> Float[Tensor, "b ..."]:
        """Guide as the sampler would: uncond + scale * (cond - uncond)."""
        return uncond + scale * (cond - uncond)

    def image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Give the images back."""
        return images


@dataclass(frozen=True)
class GuardPatch:
    """A guard with what it must remember.

    The code of the guard lives in its method's file; stored are only its tensors and JSON-ready facts, from which the
    method's `restore` rebuilds it.
    """

    kind: ClassVar[str] = "guard"

    guard: Guard
    state: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()

    def on(self, model: Generator) -> Generator:
        """Give a view that asks this guard after those already there."""
        return model.view(guards=(self.guard,), hooks=self.hooks)

    def tensors(self) -> dict[str, Tensor]:
        """Give what the guard remembers in tensors."""
        return {name: tensor.detach().contiguous() for name, tensor in self.state.items()}

    def meta(self) -> dict[str, Any]:
        """Give what the guard remembers in plain values."""
        return dict(self.facts)


_FIELDS, _EXTRA = ("tokens", "mask", "last"), "extra."


def condition_tensors(cond: Condition, name: str) -> dict[str, Tensor]:
    """Give an encoded prompt as tensors a guard can store, `<name>.tokens` and so on; `bands` is left to the facts."""
    pooled = {} if cond.pooled is None else {"pooled": cond.pooled}
    extra = {_EXTRA + key: value for key, value in cond.extra.items()}
    parts = {**{part: getattr(cond, part) for part in _FIELDS}, **pooled, **extra}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def condition_of(tensors: Mapping[str, Tensor], name: str, bands: Sequence[Sequence[int]]) -> Condition:
    """Rebuild what `condition_tensors` gave."""
    parts = {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}
    return Condition(
        tokens=parts["tokens"],
        mask=parts["mask"],
        last=parts["last"],
        pooled=parts.get("pooled"),
        extra={key.removeprefix(_EXTRA): value for key, value in parts.items() if key.startswith(_EXTRA)},
        bands=tuple((first, end) for first, end in bands),
    )
