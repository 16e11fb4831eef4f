"""A patch in the tensors other tools load: LoRA of diffusers, LoRA of kohya, full differences.

Every factored file has one rank for all layers and alpha = rank, any scale inside B: readers that ignore alpha, or the
header, or that mix up ranks, all read the same change.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.patch import Patch
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.original import UNET, kohya_module, layout
from expunge.models.unet import UNetGenerator
from expunge.ops.extract import Spectrum, enough
from expunge.patches.lowrank import Factors, LowRankPatch, product
from expunge.patches.weights import WeightPatch

TOLERANCE, CAP = 1e-3, 128
"""Without a rank asked for: the smallest that loses less than this share of the change, but at most this rank."""

View = UNetGenerator | MMDiTGenerator
DENOISERS = ("unet.", "transformer.")

# Layers of text encoders that LoRA readers know; ComfyUI and diffusers list the same ones.
_TEXT_LAYERS = re.compile(r"text_encoder(_2)?\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.(weight|bias)")


@dataclass(frozen=True)
class Weights:
    """Tensors of one file, and what they lose of the change D, in Frobenius norms."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    rank: int | None
    layers: Mapping[str, float]
    """‖D − B A‖ / ‖D‖ by parameter path."""
    error: float
    """The same over all changed tensors together, those left out counted as lost."""
    left_out: tuple[str, ...]
    """Changed tensors the format cannot hold."""
    lost: float
    """‖what is left out‖ / ‖all‖."""


@dataclass(frozen=True)
class _Factored:
    factors: Mapping[str, Factors]
    biases: Mapping[str, Tensor]
    rank: int
    layers: Mapping[str, float]
    error: float
    left_out: tuple[str, ...]
    lost: float


def lora(patch: Patch, view: View, rank: int | None) -> Weights:
    """Write a patch as diffusers' `load_lora_weights` reads it, biases of the denoiser as `lora_B.bias`.

    Raises InputError if nothing of the change fits into a LoRA.
    """
    made = _factored(patch, view, rank, biases=True)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in made.factors.items():
        name = _with_text_model(module)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        if made.biases and module.startswith(DENOISERS):  # one bias needs all: peft switches them on together
            zero = torch.zeros(up.shape[0], dtype=up.dtype)
            tensors[f"{name}.lora_B.bias"] = made.biases.get(f"{module}.bias", zero)
    header = {"lora_adapter_metadata": json.dumps(_adapter(made), sort_keys=True)}
    return Weights(tensors, header, made.rank, made.layers, made.error, made.left_out, made.lost)


def kohya(patch: Patch, view: UNetGenerator, rank: int | None) -> Weights:
    """Write a patch as kohya's trainer would; its format has no biases. Raises InputError if nothing fits."""
    made = _factored(patch, view, rank, biases=False)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in made.factors.items():
        name = kohya_module(module, view)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(made.rank))
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(made.rank),
        "ss_network_alpha": str(float(made.rank)),
        **({"ss_base_model_version": "sdxl_base_v1-0"} if view.sdxl else {}),
    }
    return Weights(tensors, header, made.rank, made.layers, made.error, made.left_out, made.lost)


def diff(patch: Patch, view: View) -> Weights:
    """Write full differences as `.diff` and `.diff_b`, which ComfyUI adds with a strength: nothing is lost.

    U-Nets under kohya's names, which A1111 knows too. Transformers under their makers' own ("diffusion_model.…"), fused
    matrices whole; no text encoders there, and not FLUX' query and key norms, which newer ComfyUI renames.
    """
    changes = _changes(patch)
    if isinstance(view, UNetGenerator):
        held = {path for path in changes if path.startswith("unet.") or _TEXT_LAYERS.match(path)}
        tensors = {_diff_name(path, kohya_module(path.rpartition(".")[0], view)): changes[path] for path in held}
    else:
        held, tensors = _native(changes, view)
    _something(tensors, changes)
    left_out = tuple(sorted(set(changes) - held))
    lost = _norm(changes[path] for path in left_out) / _norm(changes.values())
    return Weights(tensors, {}, None, dict.fromkeys(sorted(held), 0.0), lost, left_out, lost)


def _native(changes: Mapping[str, Tensor], view: View) -> tuple[set[str], dict[str, Tensor]]:
    held: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for entry in layout(view.network):
        moved = [path for path in entry.paths if path in changes]
        if moved and entry.name.startswith(UNET) and entry.name.endswith((".weight", ".bias")):
            still = {path: torch.zeros_like(view.weight(path)) for path in entry.paths if path not in changes}
            module = "diffusion_model." + entry.name.removeprefix(UNET).rpartition(".")[0]
            tensors[_diff_name(entry.name, module)] = entry.stored({**still, **changes})
            held |= set(moved)
    return held, tensors


def _diff_name(path: str, module: str) -> str:
    return module + {"weight": ".diff", "bias": ".diff_b"}[path.rpartition(".")[2]]


def _changes(patch: Patch) -> dict[str, Tensor]:
    """The full difference of every tensor that moves at all."""
    if isinstance(patch, LowRankPatch):
        changes = {path: product(*pair) for path, pair in patch.factors.items()}
    elif isinstance(patch, WeightPatch):
        changes = dict(patch.deltas)
    else:
        raise InputError(
            f"a patch of kind {patch.kind!r} has no weights; legal: {WeightPatch.kind}, {LowRankPatch.kind}"
        )
    moved = {path: delta.detach() for path, delta in changes.items() if bool(delta.any())}
    _something(moved, changes)
    return moved


def _something(held: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> None:
    if not held:
        example = f", for example {min(changes)}" if changes else ""
        raise InputError(f"none of the {len(changes)} tensors of this artifact can be written in this format{example}")


def _factored(patch: Patch, view: View, rank: int | None, *, biases: bool) -> _Factored:
    changes = _changes(patch)
    fit = {path for path in changes if _is_map(path, view)}
    maps = {path: changes[path] for path in fit if path.endswith(".weight")}
    added = {path: changes[path] for path in fit if biases and path.startswith(DENOISERS) and path.endswith(".bias")}
    _something({**maps, **added}, changes)
    left_out, total = tuple(sorted(set(changes) - set(maps) - set(added))), _norm(changes.values())
    made = _own_factors(patch, rank) or _extracted(maps, rank)
    stored = {path: _stored(made[path], maps[path].dtype) for path in maps}
    chosen = next((down.shape[0] for down, _ in stored.values()), 1)
    residual = {path: maps[path].double() - product(*pair).double() for path, pair in stored.items()}
    factors = {path.removesuffix(".weight"): pair for path, pair in sorted(stored.items())}
    for module in (path.removesuffix(".bias") for path in sorted(added)):  # some move by their bias alone
        factors.setdefault(module, _zeros(view.weight(f"{module}.weight"), chosen))
    return _Factored(
        factors=factors,
        biases=added,
        rank=chosen,
        layers={path: _norm([rest]) / _norm([maps[path]]) for path, rest in sorted(residual.items())},
        error=_norm([*residual.values(), *(changes[path] for path in left_out)]) / total,
        left_out=left_out,
        lost=_norm(changes[path] for path in left_out) / total,
    )


def _own_factors(patch: Patch, rank: int | None) -> dict[str, Factors]:
    """The factors of a low-rank patch, brought to one rank by zeros; nothing if a smaller rank is asked for."""
    if not isinstance(patch, LowRankPatch):
        return {}
    own = max(down.shape[0] for down, _ in patch.factors.values())
    if rank is not None and rank < own:
        return {}
    return {path: _padded(*pair, own) for path, pair in patch.factors.items()}


def _extracted(maps: Mapping[str, Tensor], rank: int | None) -> dict[str, Factors]:
    spectra = {path: Spectrum.of(delta) for path, delta in maps.items()}
    whole = max((len(spectrum.values) for spectrum in spectra.values()), default=1)
    chosen = min(rank or min(enough(spectra.values(), TOLERANCE), CAP), whole)
    return {path: spectrum.factors(chosen) for path, spectrum in spectra.items()}


def _is_map(path: str, view: View) -> bool:
    """Whether a tensor belongs to a linear map or convolution that LoRA readers look for."""
    module = view.network.get_submodule(path.rpartition(".")[0])
    known = not path.startswith("text_encoder") or _TEXT_LAYERS.match(path) is not None
    return known and isinstance(module, nn.Linear | nn.Conv2d)


def _padded(down: Tensor, up: Tensor, rank: int) -> Factors:
    missing = rank - down.shape[0]
    more = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
    return more, torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], dim=1)


def _stored(pair: Factors, dtype: torch.dtype) -> Factors:
    down, up = pair
    return down.to(dtype).contiguous(), up.to(dtype).contiguous()


def _zeros(weight: Tensor, rank: int) -> Factors:
    ones = (1,) * (weight.ndim - 2)
    return weight.new_zeros(rank, *weight.shape[1:]), weight.new_zeros(weight.shape[0], rank, *ones)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _with_text_model(module: str) -> str:
    """Name of a text encoder's module in LoRA files: with "text_model.", which transformers 5.6 dropped from models."""
    part, _, name = module.partition(".")
    if module.startswith(DENOISERS) or name.startswith("text_model."):
        return module
    return f"{part}.text_model.{name}"


def _adapter(made: _Factored) -> dict[str, object]:
    """The header diffusers makes peft's configuration of; a target is found by the end of its name."""
    facts: dict[str, object] = {}
    for part in sorted({module.partition(".")[0] for module in made.factors}):
        inside = [module.removeprefix(f"{part}.") for module in made.factors if module.startswith(f"{part}.")]
        facts[f"{part}.r"] = facts[f"{part}.lora_alpha"] = made.rank
        facts[f"{part}.target_modules"] = sorted(name.removeprefix("text_model.") for name in inside)
        if made.biases and f"{part}." in DENOISERS:
            facts[f"{part}.lora_bias"] = True
    return facts
