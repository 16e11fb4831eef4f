"""What the command line is tested with: the toy suite and the detector of colours that the stages are tested with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from expunge.cli.app import run
from stages.conftest import colour, recipe, suite  # noqa: F401  fixtures


@dataclass(frozen=True)
class Result:
    """What one command left behind."""

    code: int
    out: str
    err: str

    def complaint(self) -> str:
        """The one line of an error; fails if there is more, or anything on stdout."""
        assert self.code == 2, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("error: "), line
        return line


@pytest.fixture
def expunge(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def command(*words: Any) -> Result:
        capsys.readouterr()
        code = run([str(word) for word in words])
        streams = capsys.readouterr()
        return Result(code, streams.out, streams.err)

    return command
