"""What an unfinished training leaves in its run folder, so that the same command goes on after a kill.

    training/log.jsonl             rows as they are logged: the live loss
    training/<name>.safetensors    masters, moments and rows up to a step

The folder goes when the artifact is written.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expunge.core.errors import InputError
from expunge.stages import _files, _tensors

FOLDER = "training"
EVERY = 50  # steps; three tensors of each master's size are written each time


class Foreign(InputError):
    """What lies there belongs to something else, and is left alone."""


class Training:
    """Log and states of one erasure; `of` says which, and a state of another one is refused.

    writes: whether this process is the one that leaves files; the others of a team only read them.
    """

    def __init__(self, out: Path, of: str, every: int = EVERY, *, writes: bool = True) -> None:
        self.folder, self.of, self.every, self.writes = out / FOLDER, of, every, writes
        self.rows: list[dict[str, Any]] = []

    def log(self, name: str, step: int, value: float) -> None:
        """Keep a row, and show it in the file at once; a value that is not finite is kept as null."""
        self.rows.append({"name": name, "step": step, "value": value if math.isfinite(value) else None})
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # the first row begins the file anew: what a killed process logged is made again, or comes with its state
        with (self.folder / "log.jsonl").open("ab" if len(self.rows) > 1 else "wb") as file:
            file.write(_files.lines_bytes(self.rows[-1:]))

    def load(self, name: str) -> Mapping[str, Tensor]:
        """Give the state saved last under a name, and go back to the rows logged by then; empty if there is none."""
        file = self._file(name)
        if not file.exists():
            return {}
        try:
            with safe_open(file, framework="pt") as found:
                facts, tensors = found.metadata(), {key: found.get_tensor(key) for key in found.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise Foreign(f"{file} cannot be read ({error}); remove {self.folder} to start anew") from None
        if facts.get("of") != self.of:
            raise Foreign(
                f"{self.folder} holds an unfinished training of another recipe, base or version: choose another "
                "folder, or remove it to start anew"
            )
        self.rows = json.loads(facts["rows"])
        if self.writes:
            _files.write_lines(self.folder / "log.jsonl", self.rows)
        return tensors

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state of a name, whole or not at all."""
        if not self.writes:
            return
        new = self._file(f"{name}.new")
        new.unlink(missing_ok=True)
        _tensors.write(new, tensors, {"of": self.of, "rows": json.dumps(self.rows)})
        new.replace(self._file(name))
        _files.sync_folder(self.folder)

    def remove(self) -> None:
        """Nothing is unfinished any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
