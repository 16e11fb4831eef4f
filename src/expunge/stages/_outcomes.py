"""Results of attacks beside an artifact: attacks/<name>.json, whole or not at all."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.core.codec import from_data
from expunge.core.errors import InputError
from expunge.core.outcome import Outcome
from expunge.stages import _files

FOLDER = "attacks"


def place(artifact: Path, attack: str, concept: str, *, single: bool) -> Path:
    """Name the file of a result: the attack, and the concept where an artifact erased several."""
    tail = "" if single else "-" + re.sub(r"[^a-z0-9]+", "-", concept.casefold()).strip("-")
    return artifact.parent / FOLDER / f"{attack}{tail}.json"


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give values as JSON would bring them back."""
    data: dict[str, Any] = json.loads(json.dumps(values))
    return data


def kept(file: Path, question: Mapping[str, Any]) -> bool:
    """Tell whether the file answers this very question; raises InputError if it answers another."""
    if not file.exists():
        return False
    held = _files.read_json(file)
    if differ := [key for key in question if held.get(key) != question[key]]:
        key = differ[0]
        raise InputError(
            f"{file} holds a result with {key} {held.get(key)!r}, not {question[key]!r}: move it away to attack anew"
        )
    return True


def write(file: Path, outcome: Outcome) -> None:
    """Write one result; it holds counts and settings, never a prompt or a picture that an attack found."""
    _files.write_json(file, dataclasses.asdict(outcome))


def read(run: Path) -> list[Outcome]:
    """Read every result of a run folder by name; [] if none was attacked, an InputError where a control is missing."""
    return [from_data(Outcome, _files.read_json(file)) for file in sorted((run / FOLDER).glob("*.json"))]


def load(file: Path) -> Outcome:
    """Read one result."""
    return from_data(Outcome, _files.read_json(file))
