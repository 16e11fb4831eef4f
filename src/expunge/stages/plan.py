"""Plan: what a method would change in a model, how large its files would be, and the memory it would take."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.patch import Patch
from expunge.core.registry import find
from expunge.models._names import EMBEDDED, embedded_names
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.original import stored_names, written
from expunge.models.skeleton import skeleton
from expunge.models.unet import UNetGenerator
from expunge.patches.guard import GuardPatch
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.shared import SharedPatch
from expunge.patches.weights import WeightPatch
from expunge.stages import _formats, _tensors, artifact
from expunge.stages._prompts import brief, rehearsed
from expunge.stages._rehearsal import Held, Rehearsal
from expunge.stages.certify import statements
from expunge.stages.erase import check_family
from expunge.stages.recipe import checked

REQUEST = Request.of("cat", anchor="dog", retain=("guitar",))
"""What a rehearsal erases: one concept of one phrase, with an anchor, beside one that is retained."""

COPIES = 3
"""Bytes of a patch, beside the patch, while its file is put together: the file, its body, and both joined."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of patch.safetensors."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """One tensor of the network that changes."""

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Export:
    """The size of an export's tensors; its header adds a few thousand bytes."""

    format: str
    bytes: int
    rank: int | None = None
    at_most: bool = False
    """Whether the rank, and so the size, will only be known from the change."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that can be said about an erasure before it happens. Sizes are in bytes."""

    model: str
    family: str
    method: str
    dtype: str
    config: Mapping[str, Any]
    kind: str
    """Of the patch: weights, low_rank, shared or guard."""
    sites: tuple[Site, ...]
    """Empty for guards, which change no tensor. A tensor that does not move is left out of the real patch."""
    parameters: int
    """Numbers in all sites together."""
    share: float
    """Of all numbers in the model, every part of it."""
    stored: tuple[Stored, ...]
    artifact: int
    """Size of patch.safetensors."""
    exact: bool
    """False where the method takes a size from its data, so that the artifact may differ."""
    exports: tuple[Export, ...]
    loading: int
    """The fullest moment of loading: parts already there, and the weight file of the next. Just the weights where there
    are no files."""
    erasing: Held
    """The fullest moment of erasing."""
    saving: int
    """The fullest moment of describing, certifying and writing the patch, in the memory of the host."""

    @property
    def peak(self) -> int:
        """What has to fit, beside what Python and its libraries take."""
        return max(self.loading, self.erasing.total, self.saving)


def plan(
    model: str,
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    rank: int | None = None,
    checkpointing: bool = False,
    drop_encoders: bool = False,
    request: Request = REQUEST,
) -> Plan:
    """Rehearse an erasure on a model without weights, and say what it changes and what it needs.

    The method's own code runs, so a new method needs nothing here. options: fields of the method. rank: of the exports
    that have one. checkpointing, drop_encoders: as `erase` has them. Raises InputError for an unknown model, method or
    option, a method that does not edit the model's family or cannot be rehearsed, and a rank below 1.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank {rank} keeps nothing; legal: 1 or more")
    cls = find("methods", method)
    eraser = cls(**checked(cls, options or {}))
    base = skeleton(model, dtype=dtype, checkpointing=checkpointing)
    check_family(base, method, cls)
    rehearsal = Rehearsal(base.network)
    with rehearsal.running():
        patch = rehearsed(brief(eraser), base, request, Run(), method)
        erasing, guessed = rehearsal.peak, rehearsal.guessed
        rehearsal.restart()
        tensors = patch.tensors()
        saving = _saving(rehearsal, base, patch, request)
        exports = tuple(_exports(base, patch, rank))
    if drop_encoders:
        erasing = dataclasses.replace(erasing, weights=erasing.weights - _encoders(base))
    sites = tuple(
        Site(path=path, shape=tuple(base.weight(path).shape)) for path in artifact.touched(base, artifact.edited(patch))
    )
    changed = sum(torch.Size(site.shape).numel() for site in sites)
    return Plan(
        model=model,
        family=base.family,
        method=method,
        dtype=dtype,
        config=json.loads(json.dumps(dataclasses.asdict(eraser))),
        kind=patch.kind,
        sites=sites,
        parameters=changed,
        share=changed / sum(tensor.numel() for tensor in base.network.parameters()),
        stored=tuple(
            Stored(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            for name, tensor in sorted(tensors.items())
        ),
        artifact=_tensors.size(tensors, _header(model, method, patch)),
        exact=not guessed or isinstance(patch, WeightPatch),  # a difference has its weight's shape
        exports=exports,
        loading=_loading(base, EMBEDDED / model if model in embedded_names() else Path(model)),
        erasing=erasing,
        saving=saving,
    )


def _loading(base: Generator, folder: Path) -> int:
    held = most = 0
    for part, module in base.network.named_children():
        held += _bytes([*module.parameters(), *module.buffers()])
        most = max(most, held + sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")))
    return most


def _encoders(base: Generator) -> int:
    """Bytes of the text encoders."""
    heads = [module for part, module in base.network.named_children() if part.startswith("text_encoder")]
    return _bytes([tensor for module in heads for tensor in (*module.parameters(), *module.buffers())])


def _saving(rehearsal: Rehearsal, base: Generator, patch: Patch, request: Request) -> int:
    """The fullest of three moments: the card's relative changes, the file's bytes, the certificates of its copy."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in patch.tensors().values())
    artifact.changes(base, patch)
    described, written = rehearsal.peak.total, rehearsal.beside(size, COPIES)
    rehearsal.restart()
    statements(base, patch.on(base), request)
    return max(described, written, rehearsal.peak.total + size)


def _header(model: str, method: str, patch: Patch) -> dict[str, str]:
    """As long as the header that the real file has."""
    digest = "0" * 64
    facts = {"base": model, "kind": patch.kind, "method": method, "schema": "1", "format": "pt"}
    return {**facts, "base_sha256": digest, "card": digest}


def _exports(base: Generator, patch: Patch, rank: int | None) -> Iterator[Export]:
    """Sizes of what `expunge export` writes; nothing for guards."""
    if isinstance(patch, GuardPatch):
        return
    view = patch.on(base)
    assert isinstance(view, UNetGenerator | MMDiTGenerator)
    patch = patch.materialised(base) if isinstance(patch, SharedPatch) else patch
    own = max(down.shape[0] for down, _ in patch.factors.values()) if isinstance(patch, LowRankPatch) else None
    most = rank or own or _formats.CAP
    factored = [("lora", _formats.lora(patch, view, most))]
    if isinstance(view, UNetGenerator):
        factored.append(("kohya", _formats.kohya(patch, view, most)))
    for name, made in factored:
        yield Export(format=name, bytes=_bytes(list(made.tensors.values())), rank=made.rank, at_most=not (rank or own))
    yield Export(format="comfy-diff", bytes=_bytes(list(_formats.diff(patch, view).tensors.values())))
    tensors = view.network.state_dict()
    with suppress(InputError):  # the original layout has no names for it: `export` refuses "merged" too
        paths = [path for entry in written(view.network) for path in entry.paths]
        yield Export(format="merged", bytes=_bytes([tensors[path] for path in paths]))
    kept = [f"{part}.{name}" for part, module in view.network.items() for name in stored_names(module)]
    yield Export(format="pipeline", bytes=_bytes([tensors[path] for path in kept]))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
