"""A drift run that is killed keeps its targets, goes on with the rest, and mixes no settings."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import drift, effect

TARGETS = ("strawberry", "pizza", "dog")


class Pool:
    """A pool of this process alone, which dies at one of its jobs."""

    climbed: list[tuple[str, str]]
    dies_at: tuple[str, str] | None

    def __init__(self, processes: int) -> None:
        type(self).climbed = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def imap_unordered(self, climb: Callable[..., Any], jobs: list[tuple[str, str]], chunksize: int) -> Iterator[Any]:
        for job in reversed(jobs):
            if job == self.dies_at:
                raise KeyboardInterrupt
            self.climbed.append(job)
            yield climb(job)


def rungs(job: tuple[str, str], args: Namespace) -> list[drift.Point]:
    method, target = job
    rate = 1.0 if target == "dog" else 0.0
    return [
        drift.Point(method=method, target=target, steps=steps, target_rate=rate, n=30, drift=float(len(args.set)))
        for steps in ((40, 80) if method == "esd" else (40,))
    ]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Pool.dies_at = None
    monkeypatch.setattr(drift, "FILE", tmp_path / "drift.json")
    monkeypatch.setattr(drift, "climb", rungs)
    monkeypatch.setattr(drift.torch.multiprocessing, "get_context", lambda kind: Namespace(Pool=Pool))
    return tmp_path / "drift.json"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[tuple[str, str]]:
    """Run the command on three targets; gives what was climbed."""
    monkeypatch.setattr(sys, "argv", ["drift", "--targets", *TARGETS, *words])
    drift.main()
    return Pool.climbed


def test_a_killed_run_keeps_what_is_done_and_goes_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool.dies_at = ("esd", "strawberry")
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--save")
    found = json.loads(file.read_text())["points"]
    assert {(row["method"], row["target"]) for row in found} == set(Pool.climbed) and len(Pool.climbed) == 5
    Pool.dies_at = None
    assert run(monkeypatch, "--save") == [("esd", "strawberry")]
    again = json.loads(file.read_text())
    esd = [("esd", target, steps) for target in TARGETS for steps in (40, 80)]
    rest = [("all_but_one", target, 40) for target in TARGETS]
    assert [(row["method"], row["target"], row["steps"]) for row in again["points"]] == esd + rest
    before = file.read_bytes()
    assert run(monkeypatch, "--save") == [] and file.read_bytes() == before


def test_other_settings_or_another_model_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--save", "--methods", "esd")
    before = file.read_bytes()
    with pytest.raises(SystemExit, match=r"esd is on record with .*'set': \[\].*not .*'esd.lr=1'"):
        run(monkeypatch, "--save", "--set", "esd.lr=1")
    with pytest.raises(SystemExit, match=r"holds \('emoji-unet', 'objects'\), asked for \('emoji-flux', 'objects'\)"):
        run(monkeypatch, "--save", "--model", "emoji-flux")
    assert file.read_bytes() == before
    other = run(monkeypatch, "--save", "--methods", "all_but_one", "--set", "all_but_one.dual_lr=400", "esd.lr=1")
    assert other == [("all_but_one", target) for target in reversed(TARGETS)]
    facts = json.loads(file.read_text())
    assert {name: held["set"] for name, held in facts["runs"].items()} == {
        "esd": [],
        "all_but_one": ["all_but_one.dual_lr=400"],
    }


def test_without_save_all_is_climbed_beside_the_other_method_on_record(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--save")
    before = file.read_bytes()
    capsys.readouterr()
    assert len(run(monkeypatch, "--methods", "esd", "--set", "esd.lr=1", "esd.batch=2")) == len(TARGETS)
    said = capsys.readouterr().out
    assert file.read_bytes() == before and "drift 2.00e+00   all_but_one   40 steps, rate   0%, drift 0.00e+00" in said


def test_what_is_told_of_a_method_bears_its_name_on_record_only() -> None:
    args = Namespace(set=["esd.steps=3", "uce.ridge=1", "esd.lr=2e-4", "esdx.lr=1"])
    assert effect.told(args, "esd") == ["lr=2e-4", "steps=3"]
    assert effect.recorded(args, "esd") == ["esd.lr=2e-4", "esd.steps=3"]
    assert effect.told(args, "mace") == effect.recorded(args, "mace") == []
