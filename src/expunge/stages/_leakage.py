"""Leakage certificates on disk, read without torch: RUN/leakage/<concept>/certificate.json."""

import re
from pathlib import Path

from expunge.core.errors import InputError
from expunge.leakage.record import LeakageCertificate
from expunge.stages import _files

FOLDER, FILE = "leakage", "certificate.json"


def place(run_folder: Path, concept: str) -> Path:
    """Name the folder of one concept's certificate."""
    return run_folder / FOLDER / (re.sub(r"[^a-z0-9]+", "-", concept.casefold()).strip("-") or "concept")


def write(folder: Path, found: LeakageCertificate) -> Path:
    """Write certificate.json, whole or not at all."""
    _files.write_json(folder / FILE, found.data())
    return folder / FILE


def read(run_folder: Path) -> list[LeakageCertificate]:
    """Read all certificates of a run, by concept; raises InputError for a torn file or sentences that do not follow."""
    return [_read(file) for file in sorted(run_folder.glob(f"{FOLDER}/*/{FILE}"))]


def _read(file: Path) -> LeakageCertificate:
    try:
        return LeakageCertificate.of(_files.read_json(file))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
