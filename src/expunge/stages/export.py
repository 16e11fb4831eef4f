"""An artifact in the files other tools load."""

import dataclasses
import json
import os
import re
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

import expunge
from expunge.core.card import Card
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.patch import Patch
from expunge.models._folder import file_header
from expunge.models._names import EMBEDDED, embedded_names, parted
from expunge.models._quiet import quiet
from expunge.models.load import load
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.original import checkpoint
from expunge.models.unet import UNetGenerator
from expunge.patches.shared import SharedPatch
from expunge.stages import _files, _formats, _tensors, artifact
from expunge.stages._legal import FILES, check_fits, check_words, is_guard
from expunge.stages._provenance import source_of

LOSSY = 1e-5  # above float32's rounding
NAMED = 4  # tensors named in a note; a whole network has hundreds
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GUARD_NOTE = (
    "THIS ARTIFACT IS A GUARD, NOT WEIGHTS: it acts only where expunge runs its code. Written are its card and "
    "tensors, no {to} file; no other tool erases anything with them"
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what of the change is in it."""

    path: Path
    format: str
    """One of FORMATS, or "guard"."""
    bytes: int
    rank: int | None = None
    error: float = 0.0
    """‖change − written‖ / ‖change‖ over all changed tensors, in Frobenius norms."""
    layers: Mapping[str, float] = field(default_factory=dict)
    """The same by parameter path."""
    left_out: tuple[str, ...] = ()
    """Changed tensors that the format cannot hold."""
    notes: tuple[str, ...] = ()
    """What whoever loads the file must know."""


def export(
    source: Path,
    to: str,
    out: Path | None = None,
    *,
    rank: int | None = None,
    base: str | None = None,
    device: str = "cpu",
) -> Exported:
    """Write an artifact as one file or folder, whole or not at all.

    to: "lora" (diffusers; ComfyUI for transformers), "kohya" (A1111, Forge, ComfyUI; U-Nets only), "comfy-diff" (full
    differences for ComfyUI, of U-Nets also A1111), "merged" (one checkpoint in the original layout), "pipeline"
    (diffusers folder). A guard becomes a folder of card and tensors, and cannot be merged. rank: of "lora" and "kohya";
    by default that of a low-rank patch, or the smallest that loses less than 1e-3 of a full change, at most 128. base:
    where the base model is now, by default where it was. Raises InputError for what does not fit, or if `out` exists.
    """
    check_words(to, rank)
    card = artifact.read_card(source)
    check_fits(card, to, rank)
    guard = is_guard(card)
    place = out or _default(source, card, "guard" if guard else to)
    _check_place(place, folder=guard or to == "pipeline")
    name = base or card.base.name
    made, model = artifact.load(source), load(name, device=device, dtype=card.run.dtype)
    check_unquantised(model)
    view = made.on(model)
    if not isinstance(view, UNetGenerator | MMDiTGenerator):
        raise InputError(f"{name!r} is of family {view.family!r}; exports are written for families unet, mmdit")
    if guard:
        return _write_guard(made, place, to)
    about, moved = _written_for(made, model, name)
    if to == "pipeline":
        done = _write_pipeline(view, place, card, about, name)
    elif to == "merged":
        done = _write_merged(view, place, _header(about, to, name))
    else:
        patch = made.patch.materialised(model) if isinstance(made.patch, SharedPatch) else made.patch
        done = _write_adapter(patch, view, place, to, rank, _header(about, to, name))
    return dataclasses.replace(done, notes=(*moved, *done.notes))


def _written_for(made: artifact.Artifact, model: Generator, name: str) -> tuple[Card, tuple[str, ...]]:
    """The card with the base a file is written for, and a note where it is not the one the artifact was made on."""
    old = made.card.base
    if not artifact.free(made.patch) or (new := source_of(model, name)).revision == old.revision:
        return made.card, ()
    base = dataclasses.replace(old, name=name, revision=new.revision, licence=new.licence)
    note = f"made on base {old.name!r}, written for {name!r}, which has its text encoder; what it does there is open"
    return dataclasses.replace(made.card, base=base), (note,)


def check_unquantised(model: Generator) -> None:
    """Raise InputError for a model that holds quantised weights: a change cannot be added to them exactly."""
    for path, weight in model.network.named_parameters():
        if weight.dtype not in FLOATS:
            raise _quantised(model.name, path, str(weight.dtype))
    for part, module in model.network.named_children():
        if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
            raise _quantised(model.name, part, "by its loader")


def _quantised(name: str, where: str, how: str) -> InputError:
    legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
    return InputError(f"base {name!r} is quantised in {where!r} ({how}); exports need weights in one of {legal}")


def _default(source: Path, card: Card, to: str) -> Path:
    targets = "-".join(concept.name for concept in card.target)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{card.method}-{targets}".lower()).strip("-")[:80]
    end = ".safetensors" if to in FILES else ""
    return artifact.locate(source).parent / "export" / f"{slug}-{to}{end}"


def _check_place(place: Path, *, folder: bool) -> None:
    _tensors.refuse_existing(place)
    if folder == (place.suffix == ".safetensors"):
        kind = "a folder; name --out without .safetensors" if folder else "one file; name --out *.safetensors"
        raise InputError(f"{place} cannot be written: this export is {kind}")


def _header(card: Card, to: str, name: str) -> dict[str, str]:
    """What a file says about itself, wherever it goes."""
    return {
        "format": "pt",
        "expunge_version": expunge.__version__,
        "expunge_format": to,
        "method": card.method,
        "paper": card.paper,
        "config": json.dumps(card.config, sort_keys=True),
        "concept": ", ".join(concept.name for concept in card.target),
        "anchor": ", ".join(concept.name if concept else "" for concept in card.anchor),
        "base": card.base.name,
        "base_revision": card.base.revision,
        "base_sha256": card.base.sha256,
        "patch_sha256": card.patch.sha256,
        "licence": card.base.licence,
        "attribution": _attribution(name),
    }


def _attribution(name: str) -> str:
    """What the base model's README says below its front matter: credits that its licence may want passed on."""
    if (found := parted(name)) is not None:
        return file_header(found[0]).get("attribution", "")
    readme = _folder_of(name) / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()[:4000]


def _folder_of(name: str) -> Path:
    return EMBEDDED / name if name in embedded_names() else Path(name)


def _write_adapter(
    patch: Patch, view: _formats.View, place: Path, to: str, rank: int | None, about: Mapping[str, str]
) -> Exported:
    match to:
        case "lora":
            weights = _formats.lora(patch, view, rank)
        case "kohya" if isinstance(view, UNetGenerator):
            weights = _formats.kohya(patch, view, rank)
        case _:
            weights = _formats.diff(patch, view)
    losses = {
        "reconstruction_error": f"{weights.error:.6g}",
        "reconstruction_error_layers": json.dumps(weights.layers, sort_keys=True),
        "left_out": json.dumps(weights.left_out),
        **({} if weights.rank is None else {"rank": str(weights.rank), "alpha": str(weights.rank)}),
    }
    header = {**about, **losses, **weights.header}
    size = _tensors.write(place, weights.tensors, header)
    return Exported(
        path=place,
        format=to,
        bytes=size,
        rank=weights.rank,
        error=weights.error,
        layers=weights.layers,
        left_out=weights.left_out,
        notes=tuple(_notes(weights)),
    )


def _notes(weights: _formats.Weights) -> Iterator[str]:
    if weights.left_out:
        more = len(weights.left_out) - NAMED
        yield (
            f"NOT IN THIS FILE: {len(weights.left_out)} changed tensors the format cannot hold, "
            f"{100 * weights.lost:.2g} % of the change: {', '.join(weights.left_out[:NAMED])}"
            + (f" and {more} more, all named in --json and in the file's header" if more > 0 else "")
            + "; comfy-diff holds all of a U-Net's change, merged and pipeline everything"
        )
    if any(name.endswith(".lora_B.bias") for name in weights.tensors):
        yield "the file holds biases (peft's lora_bias): load it, but fuse_lora cannot fold it into layers without one"
    if weights.error - weights.lost > LOSSY:
        yield f"rank {weights.rank} keeps all but {100 * weights.error:.2g} % of the change; a higher --rank keeps more"


def _write_merged(view: _formats.View, place: Path, header: Mapping[str, str]) -> Exported:
    marks, about = {}, dict(header)
    if isinstance(view, UNetGenerator):
        sampler = view.scheduler.config
        about["prediction_type"] = str(sampler.get("prediction_type"))
        if view.sdxl and sampler.get("prediction_type") == "v_prediction":
            marks["v_pred"] = torch.zeros(0)  # how ComfyUI and Forge tell SDXL models that predict v
            if sampler.get("rescale_betas_zero_snr"):
                marks["ztsnr"] = torch.zeros(0)
    size = _tensors.write(place, ChainMap(marks, checkpoint(view)), about)  # type: ignore[arg-type]  # only read
    return Exported(path=place, format="merged", bytes=size)


def _write_pipeline(view: _formats.View, place: Path, card: Card, about: Card, name: str) -> Exported:
    with _files.whole_folder(place) as part:
        with quiet():
            view.merged().save_pretrained(part, safe_serialization=True)
        for file in sorted([*_folder_of(name).glob("LICENSE*"), *_folder_of(name).glob("NOTICE*")]):
            shutil.copyfile(file, part / file.name)
        (part / "README.md").write_text(_readme(about, name), encoding="utf-8")
        (part / "expunge-card.json").write_text(card.to_json(), encoding="utf-8")
        _sync(part)
    return Exported(path=place, format="pipeline", bytes=_size(place))


def _write_guard(made: artifact.Artifact, place: Path, to: str) -> Exported:
    note = GUARD_NOTE.format(to=to)
    with _files.whole_folder(place) as part:
        for file in (artifact.CARD, artifact.PATCH):
            _files.write_bytes(part / file, _files.read_bytes(made.folder / file))
        _files.write_bytes(part / "README.md", f"# {made.card.method}\n\n{note}.\n".encode())
    return Exported(path=place, format="guard", bytes=_size(place), notes=(note,))


def _readme(card: Card, name: str) -> str:
    targets = ", ".join(concept.name for concept in card.target)
    credits = _attribution(name)
    return (
        f"---\nlicense: {card.base.licence}\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n"
        f"# {card.base.name} without {targets}\n\n"
        f"Weights of {card.base.name} ({card.base.revision}), changed by {card.method} ({card.paper}) with expunge "
        f"{expunge.__version__} to erase: {targets}.\n"
        "expunge-card.json says how. What is left of the concept must be measured, not assumed.\n"
        + (f"\n## What the base model says\n\n{credits}\n" if credits else "")
    )


def _sync(folder: Path) -> None:
    """Make every file durable: diffusers writes them, and does not."""
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            _files.sync_folder(file)
        else:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
