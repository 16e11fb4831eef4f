"""From a name or a folder to a generator. Every way a folder can be wrong is one InputError that names the part."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from expunge.core.errors import InputError, unknown
from expunge.models import single_file
from expunge.models._folder import check_unquantised, one_line, read_json, weight_variant
from expunge.models._names import EMBEDDED, PICKLED, TINY, embedded_names, model_names, parted
from expunge.models._quiet import quiet
from expunge.models._recompute import replayed
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.tiny import Pipeline, tiny_pipeline
from expunge.models.unet import UNetGenerator

HUB = "hf:"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_SD: dict[str, type] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": SchedulerMixin,
}
_SDXL: dict[str, type] = {**_SD, "text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}
_SD3: dict[str, type] = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer_2": CLIPTokenizer,
    "text_encoder_3": T5EncoderModel,
    "tokenizer_3": T5TokenizerFast,
    "scheduler": SchedulerMixin,
}
_FLUX: dict[str, type] = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "text_encoder_2": T5EncoderModel,
    "tokenizer_2": T5TokenizerFast,
    "scheduler": SchedulerMixin,
}
Model = UNetGenerator | MMDiTGenerator
_PIPELINES = {
    StableDiffusionPipeline.__name__: _SD,
    StableDiffusionXLPipeline.__name__: _SDXL,
    StableDiffusion3Pipeline.__name__: _SD3,
    FluxPipeline.__name__: _FLUX,
}
_OPTIONAL = ("text_encoder_3", "tokenizer_3")  # SD3 is shared and run without its T5 too; the index then says null
_DENOISERS = ("unet", "transformer")
_TOKENIZERS = {
    CLIPTokenizer: ("CLIPTokenizer", "CLIPTokenizerFast"),
    T5TokenizerFast: ("T5Tokenizer", "T5TokenizerFast"),
}


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    checkpointing: bool = False,
    offload: bool = False,
) -> Model:
    """Open a model: an embedded or toy name, a diffusers folder, or "hf:org/name" from the hub, unless HF_HUB_OFFLINE.

    Only the prefix reaches the hub: a misspelt path looks like a hub id, and must not fetch a stranger's weights.
    "FILE.safetensors@FOLDER" reads a checkpoint in the original layout with configurations, tokenizers and scheduler of
    a diffusers folder or an embedded model: the file has none.

    Weights are read from safetensors only, computed in float32 unless `dtype` says otherwise. checkpointing: keep no
    activations of the denoiser's blocks for gradients, but compute them again: less memory for one more forward pass.
    offload: text encoders and autoencoder rest in the processor's memory and are on `device` only while they run.
    Raises InputError for unknown names, folders of another pipeline class, missing, mismatched or quantised parts,
    truncated files, and devices that are not there.
    """
    name, place, kind = str(name_or_path), _device(device), _dtype(dtype)
    model = _generator(_pipeline(name, kind), name, place, offload=offload)
    return replaying(model) if checkpointing else model


def replaying(model: Model) -> Model:
    """Tell the denoiser's blocks of a model just opened to compute their activations again."""
    denoiser = model.unet if isinstance(model, UNetGenerator) else model.transformer
    denoiser.enable_gradient_checkpointing(replayed)
    return model


def _pipeline(name: str, dtype: torch.dtype) -> Pipeline:
    if name in TINY:
        return tiny_pipeline(name, dtype=dtype)
    if name in embedded_names():
        return open_folder(EMBEDDED / name, dtype)
    path = Path(name)
    if path.is_dir():
        return open_folder(path, dtype)
    if (found := parted(name)) is not None:
        file, folder = found
        return open_folder(_frame(name, file, folder), dtype, file)
    if path.is_file():
        raise _lonely(path)
    if name.startswith(HUB):
        return open_folder(_downloaded(name.removeprefix(HUB)), dtype)
    raise unknown("model", name, (*model_names(), "a diffusers folder", f"{HUB}ORG/NAME from the hub"))


def open_folder(folder: Path, dtype: torch.dtype, file: Path | None = None) -> Pipeline:
    """Open a Stable Diffusion 1.x, 2.x, XL, 3 or FLUX.1 folder, without safety checker or watermark.

    file: a checkpoint in the original layout whose weights take the place of the folder's.
    """
    index = read_json(folder / "model_index.json")
    wanted = parts_of(index, folder)
    models = {part: kind for part, kind in wanted.items() if kind is not None and issubclass(kind, nn.Module)}
    check_unquantised(folder, models)
    given = {} if file is None else single_file.networks(file, folder, models, index["_class_name"], dtype)
    parts = {
        part: None if kind is None else given[part] if part in given else _part(folder, part, kind, index, dtype)
        for part, kind in wanted.items()
    }
    return assembled(index["_class_name"], parts, zeros=index.get("force_zeros_for_empty_prompt", True))


def parts_of(index: Mapping[str, Any], where: str | Path) -> dict[str, type | None]:
    """Give the parts of a pipeline and their classes, None for what its index leaves out; other classes: InputError."""
    kind = index.get("_class_name")
    if kind not in _PIPELINES:
        raise InputError(f"model folder {str(where)!r} is a {kind!r}; legal: {', '.join(sorted(_PIPELINES))}")
    absent = {part for part in _OPTIONAL if (index.get(part) or [None])[0] is None}
    return {part: None if part in absent else expected for part, expected in _PIPELINES[kind].items()}


def assembled(kind: str, parts: Mapping[str, Any], *, zeros: bool) -> Pipeline:
    """Put a pipeline together, without safety checker or watermark; zeros: how SDXL encodes the empty prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers corrects outdated schedulers, and says so each time
        if kind == StableDiffusion3Pipeline.__name__:
            return StableDiffusion3Pipeline(**parts)
        if kind == FluxPipeline.__name__:
            return FluxPipeline(**parts)
        if kind == StableDiffusionXLPipeline.__name__:
            return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        unchecked: dict[str, Any] = {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        return StableDiffusionPipeline(**parts, **unchecked)


def _frame(name: str, file: Path, folder: str) -> Path:
    """Where the configurations are that a one-file checkpoint lacks."""
    if not file.is_file():
        raise InputError(f"model {name!r}: there is no file {str(file)!r}")
    if folder in embedded_names():
        return EMBEDDED / folder
    if not Path(folder).is_dir():
        legal = ", ".join(("a local diffusers folder", *embedded_names()))
        raise InputError(f"model {name!r}: unknown folder {folder!r} behind the @; legal: {legal}")
    return Path(folder)


def _lonely(file: Path) -> InputError:
    if file.suffix in PICKLED:
        return single_file.pickled(file)
    return InputError(
        f"model {str(file)!r} is a single file without configuration and tokenizer; name a diffusers folder of its "
        f"architecture behind an @: {file}@FOLDER"
    )


def _generator(pipeline: Pipeline, name: str, place: torch.device, *, offload: bool = False) -> Model:
    flows = isinstance(pipeline, StableDiffusion3Pipeline | FluxPipeline)
    model = MMDiTGenerator(pipeline, name) if flows else UNetGenerator(pipeline, name)
    model.resting = frozenset(part for part in model.network if part not in _DENOISERS) if offload else frozenset()
    for part, module in model.network.items():
        nn.Module.to(module, "cpu" if part in model.resting else place)
    return model


def _part(folder: Path, part: str, expected: type, index: dict[str, Any], dtype: torch.dtype) -> Any:
    place = folder / part
    named = (index.get(part) or [None, None])[1]
    if named is None or not place.is_dir():
        raise InputError(f"model folder {str(folder)!r} has no part {part!r}")
    try:
        if issubclass(expected, nn.Module):
            return _network(place, expected, named, dtype)
        if expected in _TOKENIZERS:
            return _tokenizer(place, expected, named)
        return _scheduler(place, named)
    except InputError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk error is not the folder's fault
        raise InputError(f"part {part!r} of {str(folder)!r} cannot be read: {one_line(error)}") from error


def _network(place: Path, expected: Any, named: str, dtype: torch.dtype) -> nn.Module:
    if named != expected.__name__:
        raise InputError(f"part {place.name!r} of {str(place.parent)!r} is a {named}; legal: {expected.__name__}")
    read_json(place / "config.json")
    with quiet():
        model, info = expected.from_pretrained(
            place,
            torch_dtype=dtype,
            variant=weight_variant(place),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        raise InputError(f"weights in {str(place)!r} lack or misfit {len(lost)} tensors, first {lost[0]!r}")
    return model


def _tokenizer(place: Path, expected: Any, named: str) -> Any:
    if named not in _TOKENIZERS[expected]:
        raise InputError(
            f"part {place.name!r} of {str(place.parent)!r} is a {named}; legal: {_TOKENIZERS[expected][0]}"
        )
    files = ("tokenizer.json", "vocab.json" if expected is CLIPTokenizer else "spiece.model")
    if not any((place / file).is_file() for file in files):
        raise InputError(f"part {place.name!r} of {str(place.parent)!r} has neither {' nor '.join(files)}")
    return expected.from_pretrained(place, local_files_only=True)


def _scheduler(place: Path, named: str) -> SchedulerMixin:
    cls = getattr(diffusers, named, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise InputError(f"part {place.name!r} of {str(place.parent)!r} is a {named}, which is no diffusers scheduler")
    read_json(place / "scheduler_config.json")
    return cls.from_pretrained(place, local_files_only=True)


def _downloaded(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"hub id {name!r} is not of the form ORG/NAME; write {HUB}ORG/NAME")
    if os.environ.get("HF_HUB_OFFLINE"):
        raise InputError(f"model '{HUB}{name}' is on the hub and HF_HUB_OFFLINE is set; legal: names and local folders")
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise InputError(f"the hub does not give model {name!r}: {one_line(error)}") from error


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {str(name)!r}; legal: cpu, cuda, cuda:<n>, mps") from error
    if (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise InputError(f"device {str(name)!r} is not available on this machine; legal: cpu")
    return device


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return DTYPES[dtype or "float32"]
