"""What the gate's benchmark counts as a miss, and that counting one suite leaves the others' rows alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gate

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.methods.guard.gate import PromptGate
from expunge.models.load import load
from expunge.ops.reword import Reworded

SAID = ("red cat", "ginger kitten")


def gated(base: Generator, *phrases: str) -> Reworded:
    """The toy behind a gate that was told these phrases, and whose encoder says nothing."""
    target = Concept(name=phrases[0], prompts=phrases)
    request = Request(target=(target,), anchor=(Concept.of("dog"),))
    model = PromptGate(floor=1.0, others=("chair", "tree")).erase(base, request, Run()).on(base)
    assert isinstance(model, Reworded)
    return model


@pytest.fixture(scope="module")
def base() -> Generator:
    return load("tiny-unet")


@pytest.mark.parametrize("count", [gate.suffixed, gate.flipped], ids=["random_suffix", "negative_flip"])
def test_attacks_miss_nothing_that_was_told_and_win_with_what_was_not(base: Generator, count: Any) -> None:
    told = count(gated(base, *SAID), SAID, "dog", 5)
    assert (told["hits"], told["n"]) == (0, 5)
    bare = count(gated(base, "red cat"), ("ginger kitten",), "dog", 5)
    assert (bare["hits"], bare["n"]) == (5, 5)
    half = count(gated(base, "red cat"), SAID, "dog", 20)
    assert 0 < half["hits"] < 20


def test_prompts_that_attacks_cannot_rename_are_left_out() -> None:
    pairs = gate.attackable(SAID, "dog", 40, "suffix")
    assert len(pairs) == 40 and gate.aimed(SAID, pairs).prompts == tuple(prompt for prompt, _ in pairs)
    every = gate.held_out(SAID, "dog", gate.N, "suffix")
    assert any("cat," in prompt or "kitten," in prompt for prompt, _ in every), "the side that attacks refuse"


def test_distilled_models_read_no_negative_prompt() -> None:
    assert [gate.distilled(load(name)) for name in ("emoji-unet", "emoji-flux", "emoji-flux-distilled")] == [
        False,
        False,
        True,
    ]


FACTS = {"suite_digest": "a", "settings": {"floor": 0.8}, "delta": 0.05, "machine": "new"}


def test_rows_under_the_same_settings_stay_and_others_are_begun_anew() -> None:
    held = {**FACTS, "machine": "old", "targets": {"dog": 1}, "concepts": {"dog": 2}}
    assert gate.entry(held, FACTS) == {**FACTS, "targets": {"dog": 1}, "concepts": {"dog": 2}}
    for key, value in (("suite_digest", "b"), ("settings", {"floor": 0.7}), ("delta", 0.1)):
        assert gate.entry({**held, key: value}, FACTS) == {**FACTS, "targets": {}, "concepts": {}}
    assert gate.entry({}, FACTS)["targets"] == {}


def test_a_suite_is_counted_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Generator) -> None:
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    monkeypatch.setattr(gate, "load", lambda name: base)
    monkeypatch.setattr(gate, "on_target", lambda base, aim, suite: {"phrases": list(aim.concept.prompts)})
    monkeypatch.setattr(gate, "on_concept", lambda base, aim, search: {"anchor": aim.anchor})
    for words in (
        "--targets pizza",
        "--suite unsafe --targets bomb",
        "--targets dog",
        "--model emoji-flux --targets car",
    ):
        monkeypatch.setattr("sys.argv", ["gate", *words.split()])
        gate.main()
    found = json.loads((tmp_path / "gate.json").read_text())
    assert {name: list(held["targets"]) for name, held in found.items()} == {
        "emoji-unet, objects": ["pizza", "dog"],
        "emoji-unet, unsafe": ["bomb"],
        "emoji-flux, objects": ["car"],
    }
    assert list(found["emoji-unet, objects"]["concepts"]) == ["pizza", "dog"]
    monkeypatch.setattr("sys.argv", ["gate", "--suite", "styles"])
    with pytest.raises(SystemExit, match="erases styles"):
        gate.main()


def test_the_committed_file_has_an_entry_for_each_model_and_suite() -> None:
    held = json.loads((Path(gate.__file__).parent / "results" / "gate.json").read_text())
    for name, facts in held.items():
        assert name == f"{facts['model']}, {facts['suite']}" and facts["targets"].keys() >= facts["concepts"].keys()


def test_cost_is_timed_on_at_least_twenty_prompts(base: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(gate, "overhead", lambda base, model, prompts: asked.append(len(prompts)))
    for name in ("bits", "suffixed", "flipped", "misspelt"):
        monkeypatch.setattr(gate, name, lambda *_: {})
    monkeypatch.setattr(gate, "gated", lambda *_: None)
    aim = gate.load_suite("objects").target("strawberry")
    gate.on_concept(base, replace(aim, synonyms=()), False)
    assert asked == [gate.TIMED] and asked[0] >= 20
