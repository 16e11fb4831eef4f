"""The original layouts of SD3/3.5 and FLUX.1: what their makers' code calls the layers of the transformers.

Queries, keys and values of a stream are one matrix there, in FLUX' single blocks with the first layer of the feed
forward behind them; and the last modulation has shift before scale.
"""

import re
from collections.abc import Iterable, Iterator

from expunge.core.errors import InputError
from expunge.models._layout import Entry, Form, fused

_FLUX_OUTER = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_SD3_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = re.compile(r"(attn2?)\.(?:to_|add_)([qkv])(_proj)?")
_LAST = "norm_out.linear"


def flux_entries(names: Iterable[str], prefix: str, root: str) -> Iterator[Entry]:
    """List the tensors of a FLUX.1 transformer; raises InputError for a name without a place."""
    return fused(_piece(name, prefix, root, *_flux(name)) for name in names)


def sd3_entries(names: Iterable[str], prefix: str, root: str) -> Iterator[Entry]:
    """List the tensors of an SD3/3.5 transformer; raises InputError for a name without a place."""
    known = list(names)
    last = max(int(found[1]) for name in known if (found := re.match(r"transformer_blocks\.(\d+)\.", name)))
    return fused(_piece(name, prefix, root, *_sd3(name, last)) for name in known)


def _piece(name: str, prefix: str, root: str, original: str, slot: int, form: Form) -> tuple[str, int, str, Form]:
    return prefix + original, slot, root + name, form


def _flux(name: str) -> tuple[str, int, Form]:
    module, _, leaf = name.rpartition(".")
    if module in _FLUX_OUTER:
        return f"{_FLUX_OUTER[module]}.{leaf}", 0, "swapped" if module == _LAST else "same"
    if found := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module):
        single, index, layer = found.groups()
        place = f"{'single' if single else 'double'}_blocks.{index}"
        if single and layer == "proj_mlp":
            return f"{place}.linear1.{leaf}", 3, "same"
        if qkv := _FUSED.fullmatch(layer):
            inner = "linear1" if single else f"{'txt' if qkv[3] else 'img'}_attn.qkv"
            return f"{place}.{inner}.{leaf}", "qkv".index(qkv[2]), "same"
        words = _FLUX_SINGLE if single else _FLUX_DOUBLE
        if layer in words:
            return f"{place}.{words[layer]}.{'scale' if '.norm_' in layer else leaf}", 0, "same"
    raise InputError(f"transformer parameter {name!r} has no place in the original layout of FLUX.1")


def _sd3(name: str, last: int) -> tuple[str, int, Form]:
    module, _, leaf = name.rpartition(".")
    if name == "pos_embed.pos_embed":
        return "pos_embed", 0, "same"
    if module in _SD3_OUTER:
        return f"{_SD3_OUTER[module]}.{leaf}", 0, "swapped" if module == _LAST else "same"
    if found := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        place, layer = f"joint_blocks.{found[1]}", found[2]
        if qkv := _FUSED.fullmatch(layer):
            stream = "context" if qkv[3] else "x"
            return f"{place}.{stream}_block.{qkv[1]}.qkv.{leaf}", "qkv".index(qkv[2]), "same"
        if layer in _SD3_BLOCK:
            swapped = layer == "norm1_context.linear" and int(found[1]) == last  # the last block only normalises text
            return f"{place}.{_SD3_BLOCK[layer]}.{leaf}", 0, "swapped" if swapped else "same"
    raise InputError(f"transformer parameter {name!r} has no place in the original layout of Stable Diffusion 3")
