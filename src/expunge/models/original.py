"""The original layout of Stable Diffusion 1.x, 2.x and SDXL: the names and shapes one-file checkpoints are written in.

diffusers numbers blocks by kind, the original code by place: with L layers per block, layer j of down block i is
`input_blocks.{1 + i (L + 1) + j}`, its resnet in slot 0, its attention in slot 1; up blocks count the same from 0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from expunge.core.errors import InputError
from expunge.models.unet import UNetGenerator

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    ("text_encoder", "hf"): "cond_stage_model.transformer.text_model.",
    ("text_encoder", "openclip"): "cond_stage_model.model.",
    ("text_encoder", "sdxl"): "conditioner.embedders.0.transformer.text_model.",
    ("text_encoder_2", "sdxl"): "conditioner.embedders.1.model.",
}

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


def checkpoint(view: UNetGenerator) -> dict[str, Tensor]:
    """Give every weight a view sees under its original name, most of them without a copy.

    OpenCLIP encoders (SD 2.x, SDXL's second) keep q, k and v in one matrix there, and their projection transposed.
    Raises InputError for a tensor the original layout has no place for.
    """
    lost = set(view.network.state_dict()) - set(view.parameters_by_path())
    if lost:
        raise InputError(f"{view.name!r} has {min(lost)!r}, which is no parameter: the original layout cannot hold it")
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in view.parameters_by_path().items():
        part, _, name = path.partition(".")
        parts.setdefault(part, {})[name] = tensor.detach()
    names = unet_names(parts["unet"], view.unet.config.layers_per_block)
    found = {UNET + names[name]: tensor for name, tensor in parts.pop("unet").items()}
    found |= {VAE + name: tensor for name, tensor in _vae(parts.pop("vae")).items()}
    for part, tensors in parts.items():
        layout = _text_layout(view)
        convert = _hf if layout == "hf" or (layout == "sdxl" and part == "text_encoder") else _openclip
        found |= {TEXT[part, layout] + name: tensor for name, tensor in convert(tensors).items()}
    return found


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


def _vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ups = {int(found[1]) for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name))}
    return dict(_vae_entry(name, tensor, max(ups)) for name, tensor in tensors.items())


def _vae_entry(name: str, tensor: Tensor, last_up: int) -> tuple[str, Tensor]:
    for word, original in _VAE_WORDS.items():
        name = name.replace(f".{word}.", f".{original}.")
    if ".mid_block.attentions.0." in name and name.endswith("weight") and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]  # attention of the original autoencoder is made of 1×1 convolutions
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.")
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{last_up - int(found[1])}.", name)
    name = name.replace(".down_blocks.", ".down.").replace(".resnets.", ".block.")
    name = name.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
    return name, tensor


def _text_layout(view: UNetGenerator) -> str:
    if view.sdxl:
        return "sdxl"
    # SD 1.x reads OpenAI's CLIP (quick_gelu) as Hugging Face names it, SD 2.x OpenCLIP (gelu) under its own names
    return "openclip" if view.network["text_encoder"].config.hidden_act == "gelu" else "hf"


def _hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def _openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    plain = _hf(tensors)
    for name, tensor in plain.items():
        if name in _OPENCLIP:
            found[_OPENCLIP[name]] = tensor.T if name == "text_projection.weight" else tensor
        elif name.startswith("final_layer_norm."):
            found[name.replace("final_layer_norm.", "ln_final.")] = tensor
        elif inner := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            place, rest = f"transformer.resblocks.{inner[1]}.", inner[2]
            if fused := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest):
                three = [plain[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                found[f"{place}attn.in_proj_{fused[1]}"] = torch.cat(three)
            elif not re.match(r"self_attn\.[kv]_proj\.", rest):
                found[place + _openclip_layer(rest)] = tensor
        else:
            raise InputError(f"text encoder parameter {name!r} has no place in OpenCLIP's layout")
    return found


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
