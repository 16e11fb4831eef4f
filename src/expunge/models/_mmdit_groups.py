"""Which tensors of an MMDiT belong to which group, found by the modules' types."""

from collections.abc import Iterator
from typing import Any

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from expunge.core.generator import Group

Transformer = FluxTransformer2DModel | SD3Transformer2DModel

GROUPS: tuple[Group, ...] = (
    "text_in",
    "cross_kv",
    "cross_attention",
    "non_cross_attention",
    "attention",
    "all",
    "text_encoder",
)

_CONTEXT = "transformer.context_embedder."
_OUTSIDE_ESD_U = (_CONTEXT, "transformer.time_text_embed.", "transformer.norm_out.", "transformer.proj_out.")


def mmdit_paths(transformer: Transformer, group: Group) -> list[str]:
    """List the parameters of an MMDiT group, "transformer." first, in the network's order.

    text_in: weights of `context_embedder` and of the pooled text's first layer, without their biases. cross_kv:
    `add_k_proj`, `add_v_proj` of every joint attention, biases included. cross_attention (ESD-x): every attention in
    which text is read, whole: the joint ones with both their streams, and FLUX' single blocks; not SD3.5's `attn2`,
    which is attention of the image to itself. attention: that too. non_cross_attention (ESD-u): all but the attention
    that reads text, the two text and time embeddings and the output layers. all: everything.
    """
    text, image = (tuple(_attention_prefixes(transformer, text=reads)) for reads in (True, False))
    paths = [f"transformer.{name}" for name, _ in transformer.named_parameters()]
    match group:
        case "text_in":
            inside = {f"{_CONTEXT}weight", *_pooled_weights(transformer)}
            return [path for path in paths if path in inside]
        case "cross_kv":
            kv = tuple(f"{prefix}{layer}." for prefix in text for layer in ("add_k_proj", "add_v_proj"))
            return [path for path in paths if path.startswith(kv)]
        case "cross_attention":
            return [path for path in paths if path.startswith(text)]
        case "attention":
            return [path for path in paths if path.startswith((*text, *image))]
        case "non_cross_attention":
            return [path for path in paths if not path.startswith((*text, *_OUTSIDE_ESD_U))]
        case _:
            return paths


def site_roles(transformer: Transformer) -> list[tuple[str, tuple[Any, Any]]]:
    """List every linear map that reads text with its role and what it reads, text_in first."""
    found: list[tuple[str, tuple[Any, Any]]] = [(f"{_CONTEXT}weight", ("context", "tokens"))]
    found += [(path, ("pooled", "pooled")) for path in _pooled_weights(transformer)]
    for path in mmdit_paths(transformer, "cross_kv"):
        if path.endswith(".weight"):
            found.append((path, ("key" if "add_k_proj" in path else "value", "tokens")))
    order = {f"transformer.{name}": index for index, (name, _) in enumerate(transformer.named_parameters())}
    return sorted(found, key=lambda item: order[item[0]])


def _pooled_weights(transformer: Transformer) -> Iterator[str]:
    for name, module in transformer.named_modules():
        if isinstance(module, PixArtAlphaTextProjection):
            yield f"transformer.{name}.linear_1.weight"


def _attention_prefixes(transformer: Transformer, *, text: bool) -> Iterator[str]:
    """Paths, dot at the end, of the attention layers that read text, or of those that read the image alone."""
    for name, module in transformer.named_modules():
        if isinstance(module, Attention | FluxAttention) and _reads_text(module) == text:
            yield f"transformer.{name}."


def _reads_text(module: nn.Module) -> bool:
    """FLUX has text in every attention (its single blocks read both streams as one), SD3 where it projects it."""
    return isinstance(module, FluxAttention) or getattr(module, "add_k_proj", None) is not None
