"""Artifact: a patch on disk with its card. Saved whole or not at all, checked when loaded and when applied."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from expunge.core.card import Base, Card, Contents
from expunge.core.concept import Request
from expunge.core.eraser import Eraser
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.patch import Patch
from expunge.core.registry import find
from expunge.patches.guard import GuardPatch
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.shared import SharedPatch
from expunge.patches.weights import WeightPatch
from expunge.stages import _card as _card_file
from expunge.stages import _chain, _files
from expunge.stages._provenance import Code, Source, hash_tensors, provenance, sampler_settings
from expunge.stages.certify import statements

PATCH, CARD, LOG = "patch.safetensors", "card.json", "log.jsonl"
FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What was asked for: method by name and object, options the user set, request, seed, budget, parts."""

    method: str
    eraser: Eraser
    given: tuple[str, ...]
    request: Request
    seed: int
    budget: float | None = None
    parts: int = 1


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact whose file matched its card."""

    folder: Path
    card: Card
    patch: Patch

    def on(self, model: Generator) -> Generator:
        """Lay the patch on the base it was made for; raises InputError for any other base.

        Shared operators that were computed from the text alone go onto every base with the same text encoder and the
        same layers that read the text.
        """
        found = made_for(model, self.patch)
        if found != self.card.base.sha256:
            raise InputError(
                f"{self.folder} was made for base {self.card.base.name!r} ({self.card.base.sha256[:12]}); "
                f"{model.name!r} ({found[:12]}) differs in {needed(self.patch)}"
            )
        return self.patch.on(model)


def touched(model: Generator, names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return the parameters of the network that stored tensors change; empty for guards."""
    paths = {f"{name.removesuffix(end)}.weight" for name in names for end in FACTORS if name.endswith(end)}
    known = {name for name, _ in model.network.named_parameters()}
    return sorted(known & (paths | set(names)))


def free(patch: Patch) -> bool:
    """Whether a patch depends on the text encoder alone, so that it serves any base that has the same one."""
    return isinstance(patch, SharedPatch) and not patch.bound


def needed(patch: Patch) -> str:
    """What of its base a patch depends on, in words; `made_for` hashes it."""
    if isinstance(patch, GuardPatch):
        return "its text encoder, what it predicts or how it is guided"
    return "its text encoder" if free(patch) else "the tensors it touches"


def made_for(model: Generator, patch: Patch) -> str:
    """SHA-256 of what a patch needs of its base: `fingerprint`, or family and text encoder for a free one."""
    if not free(patch):
        return fingerprint(model, edited(patch))
    text = {name: model.weight(name) for name, _ in model.network.named_parameters() if name.startswith("text_encoder")}
    return _files.sha256(f"{model.family} {hash_tensors(text)}".encode())


def edited(patch: Patch) -> Mapping[str, Any]:
    """Give the names by which a patch tells which parameters it changes."""
    return patch.sites if isinstance(patch, SharedPatch) else patch.tensors()


def fingerprint(model: Generator, tensors: Mapping[str, Any]) -> str:
    """SHA-256 over the base tensors a patch touches, or over the text encoder where it touches none (guards).

    Names, dtypes, shapes and bytes count, in sorted order, as the model (a base or a view) shows them; so do the
    family, what the network predicts (eps, v) and whether guidance is distilled into it, because the same weights read
    in another way are another model.
    """
    paths = touched(model, tensors)
    if not paths:
        paths = sorted(name for name, _ in model.network.named_parameters() if name.startswith("text_encoder"))
    predicts = "distilled" if _distilled(model) else sampler_settings(model).get("prediction_type", "")
    seen = hash_tensors({path: model.weight(path) for path in paths})
    return _files.sha256(f"{model.family} {predicts} {seen}".encode())


def _distilled(model: Generator) -> bool:
    return bool(getattr(model, "distilled", False))


def changes(model: Generator, patch: Patch) -> dict[str, float]:
    """Relative change ||W' - W||_F / ||W||_F of every touched tensor, by path; a zero tensor that moves counts as 1."""
    view = patch.on(model)
    return {path: _relative(model.weight(path), view.weight(path)) for path in touched(model, edited(patch))}


def _relative(old: Tensor, new: Tensor) -> float:
    norm, moved = old.double().norm().item(), (new.double() - old.double()).norm().item()
    return moved / norm if norm > 0 else float(moved > 0)


def save(
    folder: Path,
    patch: Patch,
    model: Generator,
    job: Job,
    *,
    source: Source,
    made_by: Code,
    seconds: float,
    log: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write patch.safetensors, card.json and log.jsonl into a new folder, completely or not at all.

    Raises InputError if the folder exists, OSError if the disk is full.
    """
    tensors = patch.tensors()
    method, run = type(job.eraser), _run(model, job)
    made = provenance(method, run, seconds, made_by, budget=job.budget, parts=job.parts)
    card = _card(patch, tensors, model, job, source, made)
    if isinstance(patch, SharedPatch) and any(part.facts for part in patch.parts):
        card = _chain.merged(card, patch)
    card = _certified(card, tensors, model)
    blob = serialize(tensors, _header(card))
    card = dataclasses.replace(card, patch=dataclasses.replace(card.patch, sha256=_files.sha256(blob), bytes=len(blob)))
    with _files.whole_folder(folder) as part:
        _files.write_bytes(part / PATCH, blob)
        _files.write_bytes(part / CARD, card.to_json().encode())
        _files.write_lines(part / LOG, log)
    return folder


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return safetensors bytes that depend on the content only: the library writes its metadata in random order."""
    blob = safetensors.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    size = int.from_bytes(blob[:8], "little")
    header = json.dumps(json.loads(blob[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + blob[8 + size :]


def locate(path: Path) -> Path:
    """Return the artifact folder for a run folder or an artifact folder; raises InputError if there is none."""
    for folder in (path, path / "artifact"):
        if (folder / CARD).is_file():
            return folder
    raise InputError(f"no artifact in {path}: neither {CARD} nor artifact/{CARD} is there")


def read_card(path: Path) -> Card:
    """Read the card of a run folder or artifact folder; raises InputError for a missing or torn one."""
    return _card_file.read(locate(path) / CARD)


def load(path: Path) -> Artifact:
    """Load an artifact from its folder or its run folder.

    Raises InputError if the card is torn, if the patch file is missing, truncated or altered, or if the two do not
    belong together.
    """
    folder = locate(path)
    card, blob = read_card(folder), _files.read_bytes(folder / PATCH)
    if len(blob) != card.patch.bytes:
        raise InputError(
            f"{folder / PATCH} has {len(blob)} bytes, its card says {card.patch.bytes}: truncated or replaced"
        )
    if _files.sha256(blob) != card.patch.sha256:
        raise InputError(f"{folder / PATCH} does not match the sha256 in its card: altered or replaced")
    try:
        tensors, metadata = safetensors.load(blob), json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{folder / PATCH} is not a safetensors file: {error}") from None
    if metadata.get("__metadata__") != _header(card):
        raise InputError(
            f"{folder / CARD} is not the card that {PATCH} was saved with: one of them was edited or swapped"
        )
    return Artifact(folder, card, restore(card, tensors))


def restore(card: Card, tensors: Mapping[str, Tensor]) -> Patch:
    """Rebuild a patch from its stored tensors by the kind its card names; guards are rebuilt by their method."""
    if card.patch.kind == "guard":
        rebuilt: Patch = find("methods", card.method).restore(tensors, card.patch.meta)  # type: ignore[attr-defined]
        return rebuilt
    stored: dict[str, type[WeightPatch] | type[LowRankPatch] | type[SharedPatch]] = {
        kind.kind: kind for kind in (WeightPatch, LowRankPatch, SharedPatch)
    }
    if card.patch.kind not in stored:
        raise InputError(f"unknown kind of patch {card.patch.kind!r}; legal: guard, {', '.join(stored)}")
    return stored[card.patch.kind].restore(tensors, card.patch.meta)


def said(model: Generator, job: Job) -> dict[str, Any]:
    """Give what the card of a job says about the method and the request, and its seed."""
    method = type(job.eraser)
    return {
        "method": job.method,
        "paper": method.paper,
        "description": (inspect.getdoc(method) or "").partition("\n")[0],
        "config": json.loads(json.dumps(dataclasses.asdict(job.eraser))),
        "given": tuple(sorted(job.given)),
        "target": job.request.target,
        "anchor": job.request.anchor,
        "retain": job.request.retain,
        "seed": job.seed,
        "claims": {
            **method.claims,
            "reconstruction": method.reconstruction,
            "uses_anchor": method.uses_anchor,
            "uses_retain": job.eraser.retains,
            # such a base has no unconditional pass: the prediction under "" at scale 1 stood for it
            **({"guidance_distilled": True} if _distilled(model) else {}),
        },
    }


def _header(card: Card) -> dict[str, str]:
    """What the patch file says about itself; the card's hash leaves out hash and size of this very file."""
    bare = dataclasses.replace(card, patch=dataclasses.replace(card.patch, sha256="", bytes=0))
    return {
        "base": card.base.name,
        "base_sha256": card.base.sha256,
        "card": _files.sha256(bare.to_json().encode()),
        "format": "pt",
        "kind": card.patch.kind,
        "method": card.method,
        "schema": str(card.schema),
    }


def _certified(card: Card, tensors: Mapping[str, Tensor], model: Generator) -> Card:
    asked = Request(target=card.target, anchor=card.anchor, retain=card.retain)
    stored = restore(card, tensors).on(model)
    return dataclasses.replace(card, certificates=tuple(statements(model, stored, asked)))


def _run(model: Generator, job: Job) -> dict[str, object]:
    weight = next(model.network.parameters())
    return {"seed": job.seed, "device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}


def _card(patch: Patch, tensors: Mapping[str, Tensor], model: Generator, job: Job, source: Source, run: Any) -> Card:
    layers = changes(model, patch)
    sizes = {name: weight.numel() for name, weight in model.network.named_parameters()}
    return Card(
        **{key: value for key, value in said(model, job).items() if key != "seed"},
        base=Base(
            name=source.name,
            revision=source.revision,
            family=model.family,
            licence=source.licence,
            sha256=made_for(model, patch),
        ),
        patch=Contents(
            kind=patch.kind,
            meta=json.loads(json.dumps(patch.meta())),
            sha256="",
            tensors=len(tensors),
            bytes=0,
            share=sum(sizes[path] for path in layers) / sum(sizes.values()),
            layers=layers,
        ),
        run=run,
    )
