"""The original layouts of Stable Diffusion and FLUX.1: the names and shapes one-file checkpoints are written in.

diffusers numbers blocks by kind, the original code by place: with L layers per block, layer j of down block i is
`input_blocks.{1 + i (L + 1) + j}`, its resnet in slot 0, its attention in slot 1; up blocks count the same from 0.
The transformers of SD3 and FLUX.1 are in `_original_flow.py`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.models._layout import Checkpoint, Entry, Form, fused
from expunge.models._original_flow import flux_entries, sd3_entries
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.unet import UNetGenerator

UNET, VAE, FLUX_VAE = "model.diffusion_model.", "first_stage_model.", "vae."
DROPPED = "text_encoder.text_projection.weight"
TEXT = {
    ("text_encoder", "hf"): "cond_stage_model.transformer.",
    ("text_encoder", "openclip"): "cond_stage_model.model.",
    ("text_encoder", "sdxl"): "conditioner.embedders.0.transformer.",
    ("text_encoder_2", "sdxl"): "conditioner.embedders.1.model.",
    ("text_encoder", "flow"): "text_encoders.clip_l.transformer.",
    ("text_encoder_2", "flow"): "text_encoders.clip_g.transformer.",
}
T5 = "text_encoders.t5xxl.transformer."
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"  # two names of one table in T5

_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_WORDS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_WORDS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def checkpoint(view: UNetGenerator | MMDiTGenerator) -> Checkpoint:
    """Give every weight a view sees under its original name, made when asked for.

    OpenCLIP encoders (SD 2.x, SDXL's second) keep q, k and v in one matrix there, and their projection transposed;
    SD3 has no projection behind its first CLIP. Raises InputError for a tensor the original layout has no place for.
    """
    tensors = {**view.network.state_dict(), **view.parameters_by_path()}
    if DROPPED in layout_drops(dict(view.network.items())) and not _is_identity(tensors[DROPPED]):
        raise InputError(f"{DROPPED!r} of {view.name!r} is no identity: one-file readers of SD3 leave it out")
    return Checkpoint({entry.name: entry for entry in written(view.network)}, tensors)


def written(networks: Mapping[str, nn.Module] | nn.ModuleDict) -> list[Entry]:
    """List what a one-file checkpoint holds: the layout, and T5's table twice, as diffusers' reader ties no names.

    Raises InputError for a tensor that has no place there.
    """
    entries = layout(networks)
    return entries + [replace(entry, name=T5 + TIED) for entry in entries if entry.name == T5 + SHARED]


def layout(networks: Mapping[str, nn.Module] | nn.ModuleDict) -> list[Entry]:
    """List the original layout of a pipeline's networks, found by their types.

    Raises InputError for a tensor that has no place there.
    """
    found: list[Entry] = []
    parts = dict(networks.items())
    for part, module in parts.items():
        names = stored_names(module)
        if part == "unet":
            found += _named(unet_names(names, module.config.layers_per_block), UNET, "unet.")
        elif part == "transformer":
            entries = flux_entries if isinstance(module, FluxTransformer2DModel) else sd3_entries
            found += entries(names, UNET, "transformer.")
        elif part == "vae":
            flux = isinstance(parts.get("transformer"), FluxTransformer2DModel)
            found += _vae(names, FLUX_VAE if flux else VAE, module)
        else:
            found += _text(part, names, parts)
    return [entry for entry in found if entry.paths[0] not in layout_drops(parts)]


def layout_drops(parts: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """List tensors that readers of the layout make up themselves: the projection behind SD3's first CLIP, identity."""
    return (DROPPED,) if isinstance(parts.get("transformer"), SD3Transformer2DModel) else ()


def stored_names(module: nn.Module) -> list[str]:
    """List what a network keeps in files, each tensor once."""
    kept = module.state_dict(keep_vars=True)
    names = [*dict(module.named_parameters()), *(name for name, _ in module.named_buffers() if name in kept)]
    return [name for name in names if name != TIED or SHARED not in kept]


def _named(names: Mapping[str, str], prefix: str, root: str) -> Iterator[Entry]:
    return (Entry(prefix + original, (root + name,)) for name, original in names.items())


def _is_identity(tensor: Tensor) -> bool:
    return torch.equal(tensor, torch.eye(*tensor.shape, dtype=tensor.dtype, device=tensor.device))


def unet_names(names: Iterable[str], layers_per_block: int | Sequence[int]) -> dict[str, str]:
    """Give the original name of each U-Net parameter, by its diffusers name; raises InputError where there is none."""
    known = list(names)
    if not isinstance(layers_per_block, int):
        raise InputError(
            f"a U-Net with layers_per_block {layers_per_block!r} has no original layout; legal: one number"
        )
    attentive = {name.split(".")[1] for name in known if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return {name: _unet_name(name, layers_per_block + 1, attentive) for name in known}


def _unet_name(name: str, stride: int, attentive: set[str]) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = found.groups()
        place = 2 * int(index) + (kind == "attentions")
        return f"middle_block.{place}.{_inside(kind, rest)}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, kind, index, rest = found.groups()
        place = int(block) * stride + int(index) + (side == "down")
        slot = int(kind == "attentions")
        return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{slot}.{_inside(kind, rest)}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{(int(found[1]) + 1) * stride}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        slot = 2 if found[1] in attentive else 1  # behind the attention where there is one
        return f"output_blocks.{(int(found[1]) + 1) * stride - 1}.{slot}.conv.{found[2]}"
    raise InputError(f"U-Net parameter {name!r} has no place in the original layout of SD 1.x, 2.x or SDXL")


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, leaf = rest.partition(".")
    if layer not in _RESNET:
        raise InputError(f"resnet parameter {rest!r} has no place in the original layout of SD 1.x, 2.x or SDXL")
    return f"{_RESNET[layer]}.{leaf}"


def _vae(names: Sequence[str], prefix: str, vae: nn.Module) -> Iterator[Entry]:
    ups = {int(found[1]) for name in names if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name))}
    for name in names:
        # attention of the original autoencoder is made of 1×1 convolutions
        matrix = name.endswith(".weight") and vae.get_parameter(name).ndim == 2
        form: Form = "pointwise" if matrix and ".mid_block.attentions.0." in name else "same"
        yield Entry(prefix + _vae_name(name, max(ups)), (f"vae.{name}",), form)


def _vae_name(name: str, last_up: int) -> str:
    for word, original in _VAE_WORDS.items():
        name = name.replace(f".{word}.", f".{original}.")
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.")
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{last_up - int(found[1])}.", name)
    name = name.replace(".down_blocks.", ".down.").replace(".resnets.", ".block.")
    return name.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")


def _text(part: str, names: Sequence[str], parts: Mapping[str, nn.Module]) -> Iterator[Entry]:
    """Text encoders: Hugging Face's names, but in SD 2.x, and SDXL's second, OpenCLIP's own."""
    root = f"{part}."
    if "unet" not in parts:
        if parts[part].config.model_type.startswith("clip"):
            prefix = TEXT["text_encoder" if part == "text_encoder" else "text_encoder_2", "flow"]
            return (Entry(prefix + _with_text_model(name), (root + name,)) for name in names)
        return (Entry(T5 + name, (root + name,)) for name in names)
    layout = _text_layout(parts)
    if layout == "hf" or (layout == "sdxl" and part == "text_encoder"):
        return (Entry(TEXT[part, layout] + _with_text_model(name), (root + name,)) for name in names)
    return fused(_openclip(name, TEXT[part, layout], root) for name in names)


def _text_layout(parts: Mapping[str, nn.Module]) -> str:
    if "text_encoder_2" in parts:
        return "sdxl"
    # SD 1.x reads OpenAI's CLIP (quick_gelu) as Hugging Face names it, SD 2.x OpenCLIP (gelu) under its own names
    return "openclip" if parts["text_encoder"].config.hidden_act == "gelu" else "hf"


def _with_text_model(name: str) -> str:
    """Name in files, with the "text_model." that transformers 5.6 dropped from models."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _openclip(name: str, prefix: str, root: str) -> tuple[str, int, str, Form]:
    plain, slot = name.removeprefix("text_model."), 0
    form: Form = "transposed" if plain == "text_projection.weight" else "same"
    if plain in _OPENCLIP:
        original = _OPENCLIP[plain]
    elif plain.startswith("final_layer_norm."):
        original = plain.replace("final_layer_norm.", "ln_final.")
    elif inner := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", plain):
        original = f"transformer.resblocks.{inner[1]}."
        if part := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", inner[2]):
            original, slot = f"{original}attn.in_proj_{part[2]}", "qkv".index(part[1])
        else:
            original += _openclip_layer(inner[2])
    else:
        raise InputError(f"text encoder parameter {name!r} has no place in OpenCLIP's layout")
    return prefix + original, slot, root + name, form


def _openclip_layer(rest: str) -> str:
    module, _, leaf = rest.rpartition(".")
    if module not in _OPENCLIP_WORDS:
        raise InputError(f"text encoder parameter {rest!r} has no place in OpenCLIP's layout")
    return f"{_OPENCLIP_WORDS[module]}.{leaf}"


def kohya_module(path: str, view: UNetGenerator) -> str:
    """Name a module ("unet.….to_k") as kohya's trainer does: the key in front of ".lora_down.weight" or ".diff".

    SD 1.x and 2.x keep diffusers' names, SDXL's U-Net has the original ones; dots become underscores. Text encoders are
    lora_te, or lora_te1 and lora_te2 in SDXL. Read by kohya's scripts, A1111, Forge, ComfyUI and diffusers.
    """
    part, _, name = path.partition(".")
    if part == "unet":
        inner = _unet_module(name, view) if view.sdxl else name
        return "lora_unet_" + inner.replace(".", "_")
    if part not in ("text_encoder", "text_encoder_2"):
        raise InputError(f"{path!r} is in part {part!r}, which kohya's format cannot hold; legal: unet, text_encoder")
    prefix = {"text_encoder": "lora_te1_" if view.sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}[part]
    name = name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
    return prefix + name.replace(".", "_")


def _unet_module(name: str, view: UNetGenerator) -> str:
    known = [path for path, _ in view.unet.named_parameters()]
    own = next(path for path in known if path.rpartition(".")[0] == name)
    return unet_names(known, view.unet.config.layers_per_block)[own].rpartition(".")[0]
