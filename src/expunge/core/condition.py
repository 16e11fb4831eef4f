"""Encoded prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GUIDANCE = "guidance"
"""Key in `extra` of the scale a guidance-distilled network is asked for, one number per prompt."""


@dataclass(frozen=True)
class Condition:
    """A batch of prompts as the network reads them.

    Shapes: b prompts, l positions (padding included), d text width, p pooled width.
    """

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    """True on the opening token, the words and the first closing token; False on padding."""
    last: Int[Tensor, "b"]
    """Position of the last word, before closing tokens; 0 (the opening token) for an empty prompt."""
    pooled: Float[Tensor, "b p"] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-sample side inputs of a family, first axis b: SDXL time ids, `GUIDANCE`."""
    bands: tuple[tuple[int, int], ...] = ()
    """Positions [first, end) that one encoder each has written, the same for all prompts (SD3: CLIP's rows, then T5's);
    `last` lies in the first. () is one band, the whole window."""

    @property
    def subject(self) -> Float[Tensor, "b d"]:
        """The embedding at the last word of every prompt."""
        return self.tokens[torch.arange(len(self), device=self.tokens.device), self.last]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def cat(cls, parts: "Sequence[Condition]") -> "Condition":
        """Stack conditions along the batch, in order; all must come from one model."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            tokens=torch.cat([part.tokens for part in parts]),
            mask=torch.cat([part.mask for part in parts]),
            last=torch.cat([part.last for part in parts]),
            pooled=torch.cat(pooled) if pooled else None,
            extra={key: torch.cat([part.extra[key] for part in parts]) for key in parts[0].extra},
            bands=parts[0].bands,
        )

    def take(self, index: Int[Tensor, "n"]) -> "Condition":
        """Pick prompts by position; repeats are allowed, so `take(zeros(n))` copies the first one n times."""
        return Condition(
            tokens=self.tokens[index],
            mask=self.mask[index],
            last=self.last[index],
            pooled=None if self.pooled is None else self.pooled[index],
            extra={key: value[index] for key, value in self.extra.items()},
            bands=self.bands,
        )

    def to(self, device: torch.device) -> "Condition":
        """Give the same prompts on a device."""
        return Condition(
            tokens=self.tokens.to(device),
            mask=self.mask.to(device),
            last=self.last.to(device),
            pooled=None if self.pooled is None else self.pooled.to(device),
            extra={key: value.to(device) for key, value in self.extra.items()},
            bands=self.bands,
        )

    def equals(self, other: "Condition") -> bool:
        """Whether both hold the same prompts bit for bit, on every text route: rows, mask, pooled text, side inputs."""
        if self.extra.keys() != other.extra.keys() or self.bands != other.bands:
            return False
        routes = [(self.tokens, other.tokens), (self.mask, other.mask), (self.last, other.last)]
        routes += [(value, other.extra[key]) for key, value in self.extra.items()]
        if self.pooled is None or other.pooled is None:
            return self.pooled is other.pooled and all(_alike(*route) for route in routes)
        return all(_alike(*route) for route in [*routes, (self.pooled, other.pooled)])

    def at(self, scale: float) -> "Condition":
        """Ask a guidance-distilled network for another scale; conditions of other models come back as they are."""
        if GUIDANCE not in self.extra:
            return self
        return replace(self, extra={**self.extra, GUIDANCE: torch.full_like(self.extra[GUIDANCE], scale)})


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)
