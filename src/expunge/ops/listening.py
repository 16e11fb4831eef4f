"""Cross-attention of U-Nets, read through a view's hooks: where an image listens to which words, and losses on it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook, State

Maps = Sequence[Float[Tensor, "b _ _ l"]]
"""One map per layer: softmax(q kᵀ / √d) of every head, image positions by text positions; rows sum to 1."""

_KEY = ".to_k.weight"


@dataclass
class CrossTap:
    """Attention of the one call made with `hooks`, layer by layer, computed anew from queries and keys.

    Whatever backend the layer itself uses, maps are softmax(q kᵀ / √d) in float32; differentiable.
    """

    heads: tuple[int, ...]
    hooks: tuple[Hook, ...] = ()
    seen: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    @classmethod
    def of(cls, model: Generator) -> "CrossTap":
        """Listen to every layer of a model that has key matrices for text alone; InputError if it has none."""
        ends = [site.path for site in model.sites("cross_kv") if site.role == "key"]
        paths = [path.removesuffix(_KEY) for path in ends if path.endswith(_KEY)]
        if not paths:
            raise InputError(
                f"{model.name!r} of family {model.family!r} has no cross-attention whose maps could be read"
            )
        layers: list[Any] = [model.network.get_submodule(path) for path in paths]
        tap = cls(heads=tuple(layer.heads for layer in layers))
        tap.hooks = tuple(
            Hook(f"{path}.{part}", _keep(tap.seen[part], index))
            for index, path in enumerate(paths)
            for part in ("to_q", "to_k")
        )
        return tap

    def maps(self) -> Maps:
        """Give the layers' maps."""
        queries, keys = self.seen["to_q"], self.seen["to_k"]
        return [listened(queries[index], keys[index], heads) for index, heads in enumerate(self.heads)]


def _keep(parts: dict[int, Tensor], index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        parts[index] = output

    return keep


def listened(
    query: Float[Tensor, "b n inner"], key: Float[Tensor, "b l inner"], heads: int
) -> Float[Tensor, "b heads n l"]:
    """Attention of every head, softmax(q kᵀ / √d) with d = inner / heads."""
    q, k = (part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def listen(model: Generator, state: State, cond: Condition) -> Maps:
    """All cross-attention maps of one call of the network."""
    tap = CrossTap.of(model)
    model.view(hooks=tap.hooks).predict(state, cond)
    return tap.maps()


def grid(height: int, width: int, cells: int) -> tuple[int, int]:
    """Sides of a layer of `cells` positions that halves the latent's sides, rounded up, until it fits."""
    h, w = height, width
    while h * w > cells:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != cells:
        raise InputError(f"a layer has {cells} image positions, which no halving of {height} x {width} gives")
    return h, w


def on_grid(mask: Bool[Tensor, "b h w"], cells: int) -> Float[Tensor, "b cells"]:
    """A mask at a layer's own resolution, 0 or 1, by the nearest position."""
    sides = grid(mask.shape[1], mask.shape[2], cells)
    return nn.functional.interpolate(mask[:, None].float(), size=sides, mode="nearest").flatten(1)


def masked_attention(
    maps: Maps, columns: Bool[Tensor, "b l"], masks: Bool[Tensor, "b h w"], *, squared: bool
) -> Float[Tensor, "b"]:
    """Attention that the masked part of an image pays to the marked words, over all layers and heads.

    Σ_layers ‖A[heads, mask, words]‖_F², or the norms themselves if not squared; 0 for an empty mask.
    Source: MACE (arXiv:2403.06135); its code does not square.
    """
    total = maps[0].new_zeros(len(columns))
    for layer in maps:
        inside = on_grid(masks, layer.shape[2])[:, None, :, None] * columns[:, None, None]
        norm = torch.linalg.vector_norm((layer * inside).flatten(1), dim=1)
        total = total + (norm.square() if squared else norm)
    return total


def heat(maps: Maps, columns: Bool[Tensor, "b l"], height: int, width: int) -> Float[Tensor, "b h w"]:
    """Where an image attends to the marked words: mean over words, heads and layers, each layer enlarged smoothly."""
    found = []
    for layer in maps:
        share = (layer * columns[:, None, None]).sum(3).mean(1) / columns.sum(1, keepdim=True)
        sides = grid(height, width, layer.shape[2])
        coarse = share.unflatten(1, sides)[:, None]
        found.append(nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[:, 0])
    return torch.stack(found).mean(0)


def region(warm: Float[Tensor, "b h w"], threshold: float) -> Bool[Tensor, "b h w"]:
    """The warm part of a heat map: (F − min F) / (max F − min F) > threshold, each image for itself.

    Never empty where anything differs; a flat map has no region.
    """
    flat = warm.flatten(1)
    low, high = (side[:, None, None] for side in (flat.min(1).values, flat.max(1).values))
    return warm - low > threshold * (high - low)
