"""Certificates beside an artifact: written with every edit, read by the page and the command line."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from expunge.core.codec import from_data
from expunge.core.records import Certificate
from expunge.stages import _files

FILE = "certificates.json"


def write(folder: Path, found: Sequence[Certificate]) -> Path:
    """Write certificates.json, whole or not at all."""
    _files.write_json(folder / FILE, {"certificates": [dataclasses.asdict(each) for each in found]})
    return folder / FILE


def read(folder: Path) -> list[Certificate]:
    """Read what `write` wrote; a missing file is an empty list, a torn one an InputError."""
    if not (folder / FILE).is_file():
        return []
    return [from_data(Certificate, row) for row in _files.read_json(folder / FILE)["certificates"]]
