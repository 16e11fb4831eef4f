"""One-file checkpoints in the original layouts, read into networks that a local folder describes.

What the file is, is told by its tensors, never by its name. Configurations, tokenizers and scheduler come from the
folder; so do the weights of parts the file has nothing of (FLUX.1 is shared as a bare transformer).
"""

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.models._folder import check_whole, one_line, read_json, weight_files
from expunge.models._layout import Entry
from expunge.models._names import PICKLED
from expunge.models.original import FLUX_VAE, UNET, VAE, layout, layout_drops, stored_names

# Landmarks: a tensor no other architecture has, and the pipeline that is made of it. The first that is there counts.
_KINDS = (
    ("double_blocks.0.img_attn.qkv.weight", "FluxPipeline"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "StableDiffusion3Pipeline"),
    ("label_emb.0.0.weight", "StableDiffusionXLPipeline"),
    ("input_blocks.0.0.weight", "StableDiffusionPipeline"),
)
# What files hold beside the weights of text encoders: counters, CLIP's training temperature, unused projections, a
# second name of T5's embeddings, its tokenizer.
_IDLE = (
    ".position_ids",
    ".logit_scale",
    ".text_projection",
    ".text_projection.weight",
    ".embed_tokens.weight",
    ".spiece_model",
)
_DENOISERS = ("unet", "transformer")


def networks(file: Path, folder: Path, classes: Mapping[str, type], kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Build a pipeline's networks with the weights of a checkpoint; parts it has nothing of are left out.

    classes: what each part of the pipeline `kind` is. Raises InputError for a file of another architecture, one that
    matches no layer, lacks some of a part's tensors, has tensors of the denoiser that the folder knows no place for, or
    says that its U-Net predicts something else than the folder's scheduler takes it for.
    """
    if file.suffix in PICKLED:
        raise pickled(file)
    check_whole(file)
    with safe_open(file, "pt") as stream:
        names = {_normal(name): name for name in stream.keys()}  # noqa: SIM118  (no mapping)
        _check_kind(file, names, folder, kind)
        if "unet" in classes:
            _check_prediction(file, names, stream.metadata() or {}, folder)
        frames = {part: _frame(folder / part, classes[part]) for part in classes if (folder / part).is_dir()}
        entries = {_normal(entry.name): entry for entry in layout(frames)}
        held = _held(file, folder, names, entries, frames)
        _check_rest(file, folder, set(names) - set(entries), frames)
        weights: dict[str, Tensor] = {}
        for name, entry in entries.items():
            if entry.paths[0].partition(".")[0] in held:
                weights |= _read(file, entry, stream.get_tensor(names[name]), frames)
    for path in layout_drops(frames):
        weights[path] = torch.eye(*_shape(frames, path))
    return {part: _filled(frames[part], part, weights, dtype) for part in held}


def pickled(file: Path) -> InputError:
    """Build the error for a checkpoint that only an unpickler could read."""
    return InputError(
        f"model {str(file)!r} is pickled, which can run code and is never read; convert it to .safetensors"
    )


def kind_of(names: Iterable[str]) -> str:
    """Tell by its tensors which pipeline a checkpoint is made for, or what else it is."""
    known = {_normal(name) for name in names}
    for landmark, kind in _KINDS:
        if UNET + landmark in known:
            return kind
    if any(name.endswith((".lora_down.weight", ".lora_A.weight", ".diff")) for name in known):
        return "an adapter, which goes onto a model and is none"
    if any("_blocks." in name for name in known):
        return "a network under diffusers' names, which belongs into a diffusers folder"
    return "nothing that is known"


def _normal(name: str) -> str:
    """Bare transformers get the prefix that whole checkpoints have, and both prefixes of autoencoders are one."""
    if name.startswith(FLUX_VAE):
        return VAE + name.removeprefix(FLUX_VAE)
    first = name.partition(".")[0]
    bare = first in {landmark.partition(".")[0] for landmark, _ in _KINDS[:2]} | _BARE
    return UNET + name if bare else name


_BARE = {
    *("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer", "single_blocks"),
    *("pos_embed", "x_embedder", "t_embedder", "y_embedder", "context_embedder"),
}


def _check_kind(file: Path, names: Iterable[str], folder: Path, kind: str) -> None:
    found = kind_of(names)
    if found == kind:
        return
    if found in {pipeline for _, pipeline in _KINDS}:
        raise InputError(f"{str(file)!r} holds the weights of a {found}, {str(folder)!r} describes a {kind}")
    legal = ", ".join(sorted(pipeline for _, pipeline in _KINDS))
    raise InputError(f"no layer of {str(file)!r} matches: it holds {found}; legal: one file of a {legal}")


def _check_prediction(file: Path, names: Container[str], about: Mapping[str, str], folder: Path) -> None:
    """Compare what a file says of its prediction with the folder's scheduler; most files say nothing.

    Said in the header (ours, kohya's) or by empty tensors beside the weights, as ComfyUI and Forge look for them.
    """
    place = folder / "scheduler" / "scheduler_config.json"
    sampler = read_json(place)
    said = [about[key] for key in ("prediction_type", "modelspec.prediction_type") if key in about]
    said += ["v_prediction"] if "v_pred" in names else []
    taken = sampler.get("prediction_type", "epsilon")
    for stated in said:
        if {"v": "v_prediction"}.get(stated, stated) != taken:
            raise InputError(f"{str(file)!r} says that it predicts {stated!r}, {str(place)!r} takes it for {taken!r}")
    if "ztsnr" in names and not sampler.get("rescale_betas_zero_snr"):
        raise InputError(
            f"{str(file)!r} was trained to begin at pure noise, {str(place)!r} has no rescale_betas_zero_snr"
        )


def _frame(place: Path, expected: Any) -> nn.Module:
    """A network as its configuration describes it, without memory for weights."""
    read_json(place / "config.json")
    try:
        with init_empty_weights(include_buffers=False):
            if hasattr(expected, "load_config"):
                return expected.from_config(expected.load_config(place, local_files_only=True))
            return expected(expected.config_class.from_pretrained(place, local_files_only=True))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"part {place.name!r} of {str(place.parent)!r} cannot be built: {one_line(error)}") from error


def _held(
    file: Path, folder: Path, names: Mapping[str, str], entries: Mapping[str, Entry], frames: Mapping[str, nn.Module]
) -> list[str]:
    """Parts that the file holds, whole; the denoiser must be one of them."""
    found = []
    for part in frames:
        own = [name for name, entry in entries.items() if entry.paths[0].startswith(f"{part}.")]
        lost = [name for name in own if name not in names]
        if not lost:
            found.append(part)
        elif len(lost) < len(own) or part in _DENOISERS:
            raise InputError(
                f"{str(file)!r} lacks {len(lost)} of the {len(own)} tensors that {str(folder / part)!r} describes, "
                f"first {lost[0]!r}: another architecture, or a torn file"
            )
        elif weight_files(folder / part) is None:
            raise InputError(f"{str(file)!r} has no part {part!r}, and {str(folder / part)!r} no weights for it")
    return found


def _check_rest(file: Path, folder: Path, rest: Iterable[str], frames: Mapping[str, nn.Module]) -> None:
    """Refuse tensors of a known part that the configuration has no place for: the folder describes another network."""
    prefixes = (UNET, VAE, "cond_stage_model.", "conditioner.", "text_encoders.")
    odd = sorted(name for name in rest if name.startswith(prefixes) and not name.endswith(_IDLE))
    odd = [name for name in odd if not _is_last_openclip(name, frames)]
    if odd:
        raise InputError(
            f"{str(file)!r} holds {len(odd)} tensors that {str(folder)!r} has no place for, first {odd[0]!r}: "
            "a folder of another architecture, or quantised weights"
        )


def _is_last_openclip(name: str, frames: Mapping[str, nn.Module]) -> bool:
    """SD 2.x leaves out the last layer of its encoder: the original file has it, diffusers' configuration does not."""
    if "text_encoder_2" in frames or "text_encoder" not in frames:
        return False
    layer = frames["text_encoder"].config.num_hidden_layers
    return name.startswith(f"cond_stage_model.model.transformer.resblocks.{layer}.")


def _read(file: Path, entry: Entry, stored: Tensor, frames: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    if not stored.is_floating_point() or stored.dtype.itemsize == 1:
        raise InputError(f"{entry.name!r} in {str(file)!r} is {stored.dtype}: quantised weights are not read")
    try:
        found = entry.restored(stored, {path: _shape(frames, path)[0] for path in entry.paths})
    except ValueError as error:
        raise InputError(f"{str(file)!r} does not fit: {one_line(error)}") from error
    for path, tensor in found.items():
        if tensor.shape != _shape(frames, path):
            wanted = list(_shape(frames, path))
            raise InputError(f"{entry.name!r} in {str(file)!r} gives {path} {list(tensor.shape)}, the folder {wanted}")
    return found


def _shape(frames: Mapping[str, nn.Module], path: str) -> torch.Size:
    part, _, name = path.partition(".")
    module, _, leaf = name.rpartition(".")
    return getattr(frames[part].get_submodule(module), leaf).shape


def _filled(frame: nn.Module, part: str, weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Put weights into a network, cast as `from_pretrained` does: T5 keeps its widest layers out of float16."""
    wide = (getattr(frame, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    state = {}
    for name in stored_names(frame):
        exact = any(word in name.split(".") for word in wide)
        state[name] = weights[f"{part}.{name}"].to(torch.float32 if exact else dtype).contiguous()
    frame.load_state_dict(state, strict=False, assign=True)  # tied names are not in files, and are tied again
    if hasattr(frame, "tie_weights"):
        frame.tie_weights()
    left = [name for name, tensor in frame.state_dict().items() if tensor.is_meta]
    if left:
        raise InputError(f"part {part!r} keeps {left[0]!r} without a value")
    return frame.eval()
