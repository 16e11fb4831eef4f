"""Attention maps of joint attention, read through a view's hooks while the network runs."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


def attention(query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
    """softmax(q kᵀ / √d), head by head; every row sums to 1."""
    logits = query @ key.mT / query.shape[-1] ** 0.5
    return logits.float().softmax(-1)


def _text_columns(query: Tensor, key: Tensor, length: int) -> Float[Tensor, "b h n l"]:
    return attention(query, key)[..., :length].contiguous()  # a view would keep the rest


def mass(maps: Float[Tensor, "b n l"], columns: Bool[Tensor, "b l"]) -> Float[Tensor, "b"]:
    """Attention that all image positions together pay to the marked words: Σ_n Σ_l F_nl, between 0 and n."""
    return (maps * columns[:, None]).sum((1, 2))


def norms(maps: Float[Tensor, "k b h n l"], columns: Bool[Tensor, "b l"]) -> Float[Tensor, "b"]:
    """Attention all positions pay to the marked words, by its length over heads: Σ_n Σ_l ‖F_n·l‖₂, mean over blocks.

    What EraseAnything's released code lowers, at its batch of 1; text positions count as much as the image's.
    """
    return (maps.norm(dim=2) * columns[:, None]).sum((2, 3)).mean(0)


def paid(tap: "Tap", columns: Bool[Tensor, "b l"], how: Literal["sum", "norms"]) -> Float[Tensor, "b"]:
    """Attention paid to marked words in one call: `mass` of the image's, or `norms` of all positions'."""
    return mass(tap.text_maps(), columns) if how == "sum" else norms(tap.head_maps(), columns)


def feature(maps: Float[Tensor, "b n l"], columns: Bool[Tensor, "b l"]) -> Float[Tensor, "b n"]:
    """Where in the image a word is attended to: the mean of its columns, of length 1."""
    one = (maps * columns[:, None]).sum(2) / columns.sum(1, keepdim=True)
    return torch.nn.functional.normalize(one, dim=1)


def attended(
    model: Generator, state: State, shown: Shown, blocks: Literal["all", "last"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b n l"]]:
    """Prediction at a state, and where in the image every position of the text is attended to, from one call."""
    pred, tap = tapped(model, state, shown, blocks)
    return pred, tap.text_maps()


def tapped(
    model: Generator, state: State, shown: Shown, blocks: Literal["all", "last"]
) -> tuple[Float[Tensor, "b c h w"], "Tap"]:
    """Prediction at a state, and the attention of that call."""
    tap = Tap.of(model, blocks)
    return model.view(hooks=tap.hooks).predict(state, shown.cond), tap


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
        positions = Hook(f"{paths[0].partition('.')[0]}.pos_embed", _rotations(tap.rotary))
        tap.hooks = (positions, *_listeners(tap, model, paths[-1 if blocks == "last" else 0 :]))
        return tap

    def text_maps(self) -> Float[Tensor, "b n l"]:
        """Image rows by text columns, mean over heads and blocks; what a row lacks to 1 it pays to the image.

        A map of everything to everything is whole for one head of one block at a time, and made again for gradients: at
        4096 image positions all of them would be hundreds of GB.
        """
        return torch.stack([self._mean_map(parts) for parts in self.seen.values()]).mean(0)

    def head_maps(self) -> Float[Tensor, "k b h n l"]:
        """All rows, the text's own first, by text columns, for every block and head."""
        return torch.stack([self._maps(parts, ("asks", "query")) for parts in self.seen.values()])

    def _mean_map(self, parts: Mapping[str, Tensor]) -> Float[Tensor, "b n l"]:
        query, key, length = self._asking(parts, ("query",))
        heads = zip(query.split(1, 1), key.split(1, 1), strict=True)
        return torch.cat([checkpoint(_text_columns, q, k, length, use_reentrant=False) for q, k in heads], 1).mean(1)

    def _maps(self, parts: Mapping[str, Tensor], rows: tuple[str, ...]) -> Float[Tensor, "b h n l"]:
        return _text_columns(*self._asking(parts, rows))

    def _asking(self, parts: Mapping[str, Tensor], rows: tuple[str, ...]) -> tuple[Tensor, Tensor, int]:
        """Queries of some rows "b h n d", keys of text and image "b h m d", the text's first, and the text's length."""
        sides = {role: self._heads(parts[role]) for role in (*rows, "text", "image")}
        length = sides["text"].shape[2]
        if self.rotary:  # text positions first
            cos, sin = self.rotary[-1]
            place = {role: slice(None, length) if role in ("asks", "text") else slice(length, None) for role in sides}
            sides = {role: rotate(part, (cos[place[role]], sin[place[role]])) for role, part in sides.items()}
        query, key = (torch.cat([sides[role] for role in some], 2) for some in (rows, ("text", "image")))
        return query, key, length

    def _heads(self, part: Tensor) -> Float[Tensor, "b h n d"]:
        """Heads first: without norms they are not yet apart, FLUX norms "b n h d", SD3 "b h n d"."""
        if part.ndim == 3:
            return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return part.transpose(1, 2) if self.rotary else part


# What is kept: the norm it comes out of, and the projection if there is no norm.
_ROLES = {
    "query": ("norm_q", "to_q"),
    "image": ("norm_k", "to_k"),
    "asks": ("norm_added_q", "add_q_proj"),
    "text": ("norm_added_k", "add_k_proj"),
}


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


# Hooks know these containers and not the tap, which knows the hooks: in a circle, it would outlive its call.


def _rotations(rotary: list[Rotary]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):  # FLUX; SD3's layer of this name embeds patches and rotates nothing
            rotary.append(output)

    return keep


def _keep(parts: dict[str, Tensor], role: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        parts[role] = output

    return keep
