"""Attention maps of joint attention, read through a view's hooks while the network runs."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook, State
from expunge.ops.wording import Shown

Rotary = tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]


def rotate(x: Float[Tensor, "b h n d"], rotary: Rotary) -> Float[Tensor, "b h n d"]:
    """Turn every pair of neighbouring channels by its position's angle.

    (x_0, x_1) -> (x_0 cos − x_1 sin, x_1 cos + x_0 sin); angles come doubled, one for each channel of a pair.
    """
    cos, sin = (part.to(x.dtype) for part in rotary)
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def attention(query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h m d"]) -> Float[Tensor, "b n m"]:
    """Mean over heads of softmax(q kᵀ / √d); every row sums to 1."""
    logits = query @ key.mT / query.shape[-1] ** 0.5
    return logits.float().softmax(-1).mean(1)


def mass(maps: Float[Tensor, "b n l"], columns: Bool[Tensor, "b l"]) -> Float[Tensor, "b"]:
    """Attention that all image positions together pay to the marked words: Σ_n Σ_l F_nl, between 0 and n."""
    return (maps * columns[:, None]).sum((1, 2))


def feature(maps: Float[Tensor, "b n l"], columns: Bool[Tensor, "b l"]) -> Float[Tensor, "b n"]:
    """Where in the image a word is attended to: the mean of its columns, of length 1."""
    one = (maps * columns[:, None]).sum(2) / columns.sum(1, keepdim=True)
    return torch.nn.functional.normalize(one, dim=1)


def attended(
    model: Generator, state: State, shown: Shown, blocks: Literal["all", "last"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b n l"]]:
    """Prediction at a state, and where in the image every position of the text is attended to, from one call."""
    tap = Tap.of(model, blocks)
    return model.view(hooks=tap.hooks).predict(state, shown.cond), tap.text_maps()


@dataclass
class Tap:
    """Attention from image positions to text in the double blocks, of the one call made with `hooks`.

    Queries and keys are taken behind their norms, as this view makes them, and rotated as the block does; the softmax
    runs over text and image keys together. Differentiable.
    """

    hooks: tuple[Hook, ...]
    heads: int
    seen: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    rotary: list[Rotary] = field(default_factory=list)

    @classmethod
    def of(cls, model: Generator, blocks: Literal["all", "last"] = "all") -> "Tap":
        """Listen to the joint attention of a model, in all double blocks or the last; InputError if it has none."""
        paths = joint_attention(model)
        first: Any = model.network.get_submodule(paths[0])
        tap = cls(hooks=(), heads=first.heads)
        positions = Hook(f"{paths[0].partition('.')[0]}.pos_embed", tap._positions)
        tap.hooks = (positions, *_listeners(tap, model, paths[-1 if blocks == "last" else 0 :]))
        return tap

    def text_maps(self) -> Float[Tensor, "b n l"]:
        """Image rows by text columns, mean over heads and blocks; what a row lacks to 1 it pays to the image."""
        maps = [self._map(*(self._heads(parts[role]) for role in _ROLES)) for parts in self.seen.values()]
        return torch.stack(maps).mean(0)

    def _map(self, query: Tensor, image: Tensor, text: Tensor) -> Tensor:
        length = text.shape[2]
        if self.rotary:  # text positions first
            cos, sin = self.rotary[-1]
            text = rotate(text, (cos[:length], sin[:length]))
            query, image = (rotate(part, (cos[length:], sin[length:])) for part in (query, image))
        return attention(query, torch.cat([text, image], dim=2))[..., :length]

    def _heads(self, part: Tensor) -> Float[Tensor, "b h n d"]:
        """Heads first: without norms they are not yet apart, FLUX norms "b n h d", SD3 "b h n d"."""
        if part.ndim == 3:
            return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return part.transpose(1, 2) if self.rotary else part

    def _positions(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):  # FLUX; SD3's layer of this name embeds patches and rotates nothing
            self.rotary.append(output)


# What is kept: the norm it comes out of, and the projection if there is no norm.
_ROLES = {"query": ("norm_q", "to_q"), "image": ("norm_k", "to_k"), "text": ("norm_added_k", "add_k_proj")}


def joint_attention(model: Generator) -> list[str]:
    """Paths of the attention modules that project text keys of their own; raises InputError for a model without."""
    ending = ".add_k_proj.weight"
    paths = [site.path for site in model.sites("cross_kv") if site.path.endswith(ending)]
    if not paths:
        raise InputError(f"{model.name!r} of family {model.family!r} has no joint attention with text keys of its own")
    return [path.removesuffix(ending) for path in paths]


def _listeners(tap: Tap, model: Generator, paths: list[str]) -> Iterator[Hook]:
    for path in paths:
        attn = model.network.get_submodule(path)
        for role, (norm, projection) in _ROLES.items():
            layer = projection if getattr(attn, norm, None) is None else norm
            yield Hook(f"{path}.{layer}", _keep(tap.seen[path], role))


def _keep(parts: dict[str, Tensor], role: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        parts[role] = output

    return keep
