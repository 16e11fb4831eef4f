"""Models without weights: every tensor has its name, shape and dtype, and lives on the meta device."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel

from expunge.core.errors import unknown
from expunge.models._folder import check_unquantised, read_json
from expunge.models._names import EMBEDDED, SHAPES, TINY, embedded_names, model_names, shape_names
from expunge.models._quiet import quiet
from expunge.models._tiny_text import tiny_t5_tokenizer, tiny_tokenizer
from expunge.models.load import Model, _dtype, _generator, _part, assembled, parts_of, replaying
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.tiny import Pipeline, tiny_pipeline
from expunge.models.unet import UNetGenerator

META = torch.device("meta")


def skeleton(
    name_or_path: str | Path, *, dtype: torch.dtype | str | None = None, checkpointing: bool = False
) -> UNetGenerator | MMDiTGenerator:
    """Open a model without reading or making a single weight.

    A name of `shape_names` (published models, described in `models/shapes/`), any name that `load` knows, or a local
    diffusers folder, whose weight files may be absent. Tokenizers of named shapes are stand-ins: they split text in
    their own way, windows and all tensors are the published model's. checkpointing: as `load` has it. Raises InputError
    as `load` does.
    """
    name = str(name_or_path)
    model = _generator(_bare(name, _dtype(dtype)), name, META)
    return replaying(model) if checkpointing else model


def bare(model: Model) -> Model:
    """Give a model just opened again without its numbers; it stays as it is, and nothing of it is copied."""
    seen = {id(tensor): nn.Parameter(tensor.detach().to(META)) for tensor in model.network.parameters()}
    pipeline = copy.copy(model.pipeline)
    pipeline.register_modules(**copy.deepcopy(dict(model.network.items()), seen))
    return _generator(pipeline, model.name, META)


def _bare(name: str, dtype: torch.dtype) -> Pipeline:
    if name in shape_names():
        return _described(read_json(SHAPES / f"{name}.json"), dtype)
    if name in TINY:
        return _stripped(tiny_pipeline(name, dtype=dtype))
    folder = EMBEDDED / name if name in embedded_names() else Path(name)
    if not folder.is_dir():
        raise unknown("model", name, (*shape_names(), *model_names(), "a diffusers folder"))
    return _folder(folder, dtype)


def _stripped(pipeline: Pipeline) -> Pipeline:
    """Take the numbers out of a pipeline; what is one tensor under two names stays one, which `Module.to` forgets."""
    seen: dict[nn.Parameter, nn.Parameter] = {}
    for part in pipeline.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = seen.setdefault(parameter, nn.Parameter(parameter.detach().to(META)))
    return pipeline


def _described(shape: Mapping[str, Any], dtype: torch.dtype) -> Pipeline:
    configs, made = shape["parts"], {}
    index = {"_class_name": shape["pipeline"], **{part: ["", ""] for part in configs}}
    for part, expected in parts_of(index, shape["pipeline"]).items():
        if issubclass(expected, nn.Module):
            made[part] = _network(expected, configs[part], dtype)
        elif part.startswith("tokenizer"):
            made[part] = tiny_tokenizer() if expected is CLIPTokenizer else tiny_t5_tokenizer()
            made[part].model_max_length = configs[part]["model_max_length"]
        else:
            made[part] = getattr(diffusers, configs[part]["_class_name"]).from_config(configs[part])
    return assembled(shape["pipeline"], made, zeros=True)


def _folder(folder: Path, dtype: torch.dtype) -> Pipeline:
    index, made = read_json(folder / "model_index.json"), {}
    wanted = parts_of(index, folder)
    check_unquantised(folder, [part for part, kind in wanted.items() if kind is not None])
    for part, expected in wanted.items():
        if expected is None:
            made[part] = None
        elif issubclass(expected, nn.Module):
            made[part] = _network(expected, read_json(folder / part / "config.json"), dtype)
        else:
            made[part] = _part(folder, part, expected, index, dtype)
    return assembled(index["_class_name"], made, zeros=index.get("force_zeros_for_empty_prompt", True))


def _network(expected: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build one component on the meta device in the dtypes that `from_pretrained` would give it."""
    with quiet(), META:
        if issubclass(expected, PreTrainedModel):
            model = expected(expected.config_class.from_dict(dict(config)))
        else:
            model = expected.from_config(dict(config))
    nn.Module.to(model, dtype)
    if dtype == torch.float16:  # transformers keeps T5's output layers wide in half precision
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in (getattr(model, "_keep_in_fp32_modules", None) or ()):
                module.to(torch.float32)
    return model
