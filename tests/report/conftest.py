"""One finished run folder for all tests of the page."""

from pathlib import Path

import pytest

from expunge.report.page import render
from report.made_run import write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three methods, with its page."""
    folder = write_run(tmp_path_factory.mktemp("page") / "run")
    (folder / "report.html").write_text(render(folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def page(run_folder: Path) -> str:
    """The page of that run."""
    return (run_folder / "report.html").read_text(encoding="utf-8")
