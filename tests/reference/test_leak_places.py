"""Rates of a leak run with other settings stand beside the others, and are written over none."""

import argparse
import json
from pathlib import Path

import pytest
from benchmarks import leak


def asked(name: str = "", told: tuple[str, ...] = (), suite: str = "objects") -> argparse.Namespace:
    return argparse.Namespace(model="models/emoji-flux", name=name, set=list(told), suite=suite)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(leak, "RESULTS", tmp_path)
    return tmp_path


def test_a_named_run_has_a_file_of_its_own() -> None:
    assert leak.place(asked()).name == "leak-emoji-flux.json"
    assert leak.place(asked("taught-at-3.5")).name == "leak-emoji-flux-taught-at-3.5.json"


def test_other_settings_are_refused_the_same_file(results: Path) -> None:
    (results / "leak-emoji-flux.json").write_text(json.dumps({"suite": "objects", "set": [], "targets": ["cat"]}))
    assert leak.place(asked()).exists()  # the same settings again, on other targets if need be
    at_one = ("esd.embedded_scales=[3.5]",)
    with pytest.raises(SystemExit, match=r"leak-emoji-flux.json holds set \[\].*esd.embedded_scales.*--name"):
        leak.place(asked(told=at_one))
    with pytest.raises(SystemExit, match="holds suite objects, asked for styles"):
        leak.place(asked(suite="styles"))
    assert not leak.place(asked("taught-at-3.5", at_one)).exists()
