"""What an unfinished training leaves in its run folder, so that the same command goes on after a kill.

    training/log.jsonl             rows as they are logged: the live loss
    training/<name>.safetensors    masters, moments and rows up to a step

The folder goes when the artifact is written.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expunge.core.eraser import Kept
from expunge.core.errors import InputError
from expunge.core.patch import Patch
from expunge.ops.fit import Diverged
from expunge.stages import _files, _tensors

FOLDER = "training"
_NEW = ".new.safetensors"  # still being written
EVERY = 50  # steps; three tensors of each master's size are written each time


class Foreign(InputError):
    """What lies there belongs to something else, and is left alone."""


class Halted(InputError):
    """A training whose numbers are no longer finite; what it was before is kept."""


class Training:
    """Log and states of one erasure; `of` says which, and a state of another one is refused.

    writes: whether this process is the one that leaves files; the others of a team only read them.
    """

    def __init__(self, out: Path, of: str, every: int = EVERY, *, writes: bool = True) -> None:
        self.folder, self.of, self.every, self.writes = out / FOLDER, of, every, writes
        self.rows: list[dict[str, Any]] = []
        self.found: Path | None = None
        """The state that was loaded or saved last."""

    def log(self, name: str, step: int, value: float) -> None:
        """Keep a row, and show it in the file at once; a value that is not finite is kept as null."""
        self.rows.append({"name": name, "step": step, "value": value if math.isfinite(value) else None})
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # the first row begins the file anew: what a killed process logged is made again, or comes with its state
        with (self.folder / "log.jsonl").open("ab" if len(self.rows) > 1 else "wb") as file:
            file.write(_files.lines_bytes(self.rows[-1:]))

    def check(self) -> None:
        """Raise Foreign where a state lies that is not of this erasure, or cannot be read."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if not file.name.endswith(_NEW):  # a writer was killed there
                self._facts(file)

    def load(self, name: str) -> Mapping[str, Tensor]:
        """Give the state saved last under a name, and go back to the rows logged by then; empty if there is none."""
        file = self._file(name)
        if not file.exists():
            return {}
        self.rows, self.found = json.loads(self._facts(file)["rows"]), file
        if self.writes:
            _files.write_lines(self.folder / "log.jsonl", self.rows)
        with _reading(file) as found:
            return {key: found.get_tensor(key) for key in found.keys()}  # noqa: SIM118

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state of a name, whole or not at all."""
        self.found, new = self._file(name), self.folder / f"{name}{_NEW}"
        if not self.writes:
            return
        new.unlink(missing_ok=True)
        _tensors.write(new, tensors, {"of": self.of, "rows": json.dumps(self.rows)})
        new.replace(self.found)
        _files.sync_folder(self.folder)

    def remove(self) -> None:
        """Nothing is unfinished any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def not_finite(self) -> list[str]:
        """Names of the numbers logged in the last step that are not finite, in order."""
        last = [row for row in self.rows if row["step"] == self.rows[-1]["step"]]
        return list(dict.fromkeys(row["name"] for row in last if row["value"] is None))

    def _facts(self, file: Path) -> dict[str, str]:
        """Read what a state says of itself; raises Foreign unless it is of this erasure."""
        with _reading(file) as found:
            facts: dict[str, str] = found.metadata()
        if facts.get("of") != self.of:
            raise Foreign(
                f"{self.folder} holds an unfinished training of another recipe, base or version: choose another "
                "folder, or remove it to start anew"
            )
        return facts

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as found:
            yield found
    except (OSError, SafetensorError) as error:
        raise Foreign(f"{file} cannot be read ({error}); remove {file.parent} to start anew") from None


class Stop:
    """Keeps the state of a training after its last finite step, and lets it go no further."""

    def __init__(self, training: Training, error: Diverged) -> None:
        self.training, self.error, self.every = training, error, error.steps

    def load(self, name: str) -> Mapping[str, Tensor]:
        """Give what is kept."""
        return self.training.load(name)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state; raises the error that ended the training."""
        self.training.save(name, tensors)
        raise self.error


def halting(learn: Callable[[Kept], Patch], training: Training) -> Patch:
    """Run a training. Where it diverges, keep the state of its last finite step, and say which numbers were not finite.

    That state is gone by then: gradients are spent while others are still being found, and a loss changes tensors of
    its own. But a step made again has the same bits, so the training is, from the state kept last to the one wanted.
    Raises Halted, or Diverged where there is nothing to keep.
    """
    try:
        return learn(training)
    except Diverged as error:
        terms = ", ".join(training.not_finite())
        if error.steps:
            training.rows = []
            with suppress(Diverged):
                learn(Stop(training, error))
        if training.found is None:
            raise
        kept = f"the state before that step is kept in {training.found}"
        raise Halted(f"{error}; not finite there: {terms}; {kept}") from None
