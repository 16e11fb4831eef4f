"""Sequel: artifacts composed into one, and erasures taken out again."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expunge.core.eraser import Run
from expunge.core.errors import InputError, unknown
from expunge.core.registry import find
from expunge.models.load import load
from expunge.patches.shared import Part, SharedPatch
from expunge.stages import _chain, _files, artifact
from expunge.stages._provenance import code, source_of
from expunge.stages.recipe import checked


def compose(
    sources: Sequence[Path], out: Path, run: Run, *, base: str | None = None, recorded: bool = True
) -> tuple[Path, list[dict[str, Any]]]:
    """Make one artifact of several, in order; return its folder, and how its parts act on one another.

    Erasures over one regulariser (ridge and retained rows) are solved together: that is the joint solve of all of
    them, in any order. Others multiply, W M_A M_B, and the order matters as far as `commutator` says. base: the model
    it is for, by default the first artifact's; one with the same text encoder and layers serves as well. Raises
    InputError for patches that are no shared operators, for a later one that was computed from the weights, not from
    the text alone, for another text encoder, and for requests that contradict each other.
    """
    if not sources:
        raise InputError("nothing to compose; name one artifact or more")
    made = [artifact.load(source) for source in sources]
    parts: list[Part] = []
    for each in made:
        patch = _chain.shared(each.patch, each.folder, each.card.method)
        if parts and patch.bound:
            raise InputError(
                f"{each.folder} was computed from weights of {each.card.base.name!r}, not from text alone, and fits "
                f"no others: erase {_named(patch.parts)} anew, with --on {sources[0]}"
            )
        parts += _chain.told(each.card, patch)
    return _write(tuple(parts), made, out, run, base or made[0].card.base.name, recorded=recorded)


def undo(
    source: Path, targets: Sequence[str], out: Path, run: Run, *, base: str | None = None, recorded: bool = True
) -> tuple[Path, list[dict[str, Any]]]:
    """Take targets out of an artifact; what is left is exactly the artifact of someone who never erased them.

    Raises InputError where that is not so: for a target that was solved as one operator with others, and for one
    before an erasure that was computed from the weights it left.
    """
    made = artifact.load(source)
    patch = _chain.shared(made.patch, made.folder, made.card.method)
    parts = _chain.told(made.card, patch)
    gone = _found(parts, targets)
    left = tuple(part for index, part in enumerate(parts) if index not in gone)
    if not left:
        raise InputError(f"{made.folder} erases nothing but {', '.join(targets)}: use {made.card.base.name!r} itself")
    tied = [part for index, part in enumerate(parts) if index > min(gone) and index not in gone and part.bound]
    if tied:
        raise InputError(
            f"{_named(tied)} was computed from the weights that erasing {', '.join(targets)} left, so it is not "
            "what it would be without: undo it too, or erase it anew"
        )
    return _write(left, [made], out, run, base or made.card.base.name, recorded=recorded)


def _found(parts: Sequence[Part], targets: Sequence[str]) -> set[int]:
    """Indices of the parts that erase the targets and nothing else."""
    names = {name.casefold(): index for index, part in enumerate(parts) for name in part.targets}
    asked = {" ".join(target.casefold().split()) for target in targets}
    for target in sorted(asked - set(names)):
        raise unknown("target", target, names)
    gone = {names[target] for target in asked}
    for index in gone:
        others = [name for name in parts[index].targets if name.casefold() not in asked]
        if others:
            raise InputError(
                f"{_named([parts[index]])} were solved as one operator, which cannot be taken apart: undo "
                f"{', '.join(others)} as well, or erase anew"
            )
    return gone


def _write(
    parts: tuple[Part, ...], made: Sequence[artifact.Artifact], out: Path, run: Run, name: str, *, recorded: bool
) -> tuple[Path, list[dict[str, Any]]]:
    request, folder = _chain.request_of(parts), out / "artifact"
    run.progress(f"load {name}", 0, 1)
    model = load(name, device=run.device, dtype=made[0].card.run.dtype)
    run.progress(f"load {name}", 1, 1)
    for each in made:
        each.on(model)  # refuses another text encoder and other layers
    start = time.monotonic()
    patch = SharedPatch.of(parts, model)
    if folder.exists():
        _check_same(artifact.load(folder), patch, folder)
    else:
        said = parts[-1].facts
        method = find("methods", said["method"])
        job = artifact.Job(
            method=said["method"],
            eraser=method(**checked(method, said["config"])),
            given=tuple(said["given"]),
            request=request,
            seed=said["seed"],
        )
        source, made_by = source_of(model, name), code(recorded=recorded)
        out.mkdir(parents=True, exist_ok=True)
        _files.sweep(out)
        seconds = time.monotonic() - start
        artifact.save(folder, patch, model, job, source=source, made_by=made_by, seconds=seconds)
    return folder, _chain.order(patch)


def _check_same(found: artifact.Artifact, patch: SharedPatch, folder: Path) -> None:
    old, new = found.patch.tensors(), patch.tensors()
    same = found.card.patch.meta == json.loads(json.dumps(patch.meta())) and old.keys() == new.keys()
    if not same or not all(torch.equal(old[name], new[name]) for name in old):
        raise InputError(f"{folder} holds a finished artifact of other parts: choose another folder")


def _named(parts: Sequence[Part]) -> str:
    return ", ".join(name for part in parts for name in part.targets)
