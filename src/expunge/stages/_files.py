"""Whole files or none: data goes to a temporary name in the same folder, is synced, and is renamed into place."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError

PART = ".part"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename lives in its folder, not in the renamed file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """Hidden name beside `path`, unique to this process, so that two writers of one file never share it."""
    return path.with_name(f".{path.name}.{os.getpid()}{PART}")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all; a failing disk raises OSError and leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, two spaces, one trailing newline, no NaN."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_bytes(path, json_bytes(value))


def read_bytes(path: Path) -> bytes:
    """Read a file that must exist; raises InputError naming it."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"no such file: {path}") from None


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; raises InputError that says where it is torn."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not valid JSON ({error}); the file is torn or was edited") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} holds {type(value).__name__}, expected a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; raises InputError for a missing or torn file."""
    return parse_object(read_bytes(path), str(path))


def lines_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines: one object per row, keys sorted, ASCII only: no sign in a prompt can break a line for any reader."""
    dump = json.JSONEncoder(sort_keys=True, allow_nan=False).encode
    return "".join(dump(row) + "\n" for row in rows).encode()


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines atomically, whole file at once: an index never ends in half a row."""
    write_bytes(path, lines_bytes(rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a missing file is an empty list, a torn one an InputError with its line number."""
    if not path.exists():
        return []
    lines = read_bytes(path).splitlines()
    return [parse_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder; what a living process is still writing stays."""
    for part in folder.glob(f".*.*{PART}"):
        if _alive(part.name.removesuffix(PART).rpartition(".")[2]):
            continue
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False  # our own: nothing of this process is being written while it sweeps
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # it lives, under another user
    return True


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Files inside must be synced by their writers. Raises InputError if `path` exists: nothing is ever overwritten.
    """
    if path.exists():
        raise InputError(f"{path} exists already; nothing is overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        sync_folder(part)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(path.parent)
