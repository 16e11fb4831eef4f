"""certify on the toy model: the road from flags to sentences, its exit codes, and what it refuses before drawing."""

import json
from pathlib import Path

import pytest

from expunge.core.concept import Concept
from expunge.core.records import OperatingPoint
from expunge.leakage import twins
from expunge.leakage.record import LeakageCertificate
from stages.conftest import Colour

RED = ("--target", "red", "--anchor", "green", "--method", "uce", "--set", "ridge=0.001")
PAIRS = 20


@pytest.fixture
def run(tmp_path: Path, expunge, colour, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An erased toy model; certificates take 20 twin prompts in place of 250."""
    monkeypatch.setitem(twins.PAIRS, "quick", PAIRS)
    monkeypatch.setattr("expunge.leakage.pipeline.REPEATS", 3)
    monkeypatch.setattr("expunge.stages._looks.catalogue", lambda package: {"colour": Path(__file__)})
    assert expunge("erase", "tiny-unet", *RED, "--out", tmp_path / "run").code == 0
    return tmp_path / "run"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Sentences of the toy's language."""
    file = tmp_path / "prompts.txt"
    words = ("cat", "dog", "car", "house")
    file.write_text("\n".join(f"a {a} and a {{}} {b} {c}" for a in words for b in words for c in words))
    return file


def test_a_toy_that_draws_noise_fails_its_controls_with_exit_code_3(run: Path, suite: Path, lines: Path, expunge):
    words = ("certify", run, "--concept", "red", "--level", "quick", "--suite", suite, "--prompts", lines)
    first = expunge(*words, "--json")
    assert first.code == 3, first
    told = json.loads(first.out)
    assert told["verdict"] == ["INVALID (control failed)"]
    file = run / "leakage" / "red" / "certificate.json"
    stored = json.loads(file.read_text())
    assert stored == told and LeakageCertificate.of(stored).data()["scope"]["anchor"] == "green"
    assert (told["scope"]["n_prompts"], told["design"]["splits"]) == (PAIRS, [10, 4, 6])
    assert {row["name"] for row in told["detector"]} == {"colour"}
    assert {row["kind"] for row in told["family"]} == {"pixels", "latents"}
    pictures = list((run / "leakage" / "red" / "pictures").glob("*.png"))
    assert len(pictures) == 5 * PAIRS
    # a second call draws nothing and says the same; an altered picture alone is drawn again, as it was
    before, spoiled = {each: (each.stat().st_mtime_ns, each.read_bytes()) for each in pictures}, pictures[3]
    spoiled.write_bytes(pictures[4].read_bytes())
    again = expunge(*words)
    assert again.code == 3 and again.out.strip() == "INVALID (control failed)" and "control failed: " in again.err
    assert json.loads(file.read_text()) == stored
    moved = {each for each in pictures if each.stat().st_mtime_ns != before[each][0]}
    assert spoiled in moved and len(moved) <= 8 and all(each.read_bytes() == before[each][1] for each in moved)
    assert "pictures with prompts_sha256" in expunge(*words, "--seed", 1).complaint()


def test_paths_of_a_noisy_sampler_are_compared_and_the_word_vacuous_stands_where_nothing_is_bounded(
    run: Path, suite: Path, lines: Path, expunge
):
    words = ("certify", run, "--concept", "red", "--level", "quick", "--suite", suite, "--prompts", lines)
    found = expunge(*words, "--noise-floor", 0.05, "--path")
    assert found.code == 3, found
    row = json.loads((run / "leakage" / "red" / "certificate.json").read_text())
    assert row["scope"]["sampler"].startswith("AncestralScheduler") and row["scope"]["sampler"].endswith("floor 0.05")
    path = row["path"]
    assert path["kl10"] > 0 and path["kl01"] > 0 and path["base_ratio"] not in (0, 1, None)
    assert path["vacuous"] == (path["I_hi"] >= 1) == ("vacuous" in found.err)
    assert f"divergence {path['base_ratio']:.2g} of the base model's" in found.err
    # the same pictures were not drawn by the model's own sampler
    assert "pictures with model_sha256" in expunge(*words).complaint()


def test_what_cannot_be_certified_is_refused_before_anything_is_drawn(
    run: Path, suite: Path, lines: Path, expunge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    words = ("certify", run, "--concept", "red", "--level", "quick", "--suite", suite)
    short = tmp_path / "short.txt"
    short.write_text("a {}\n")
    bad = tmp_path / "bad.txt"
    bad.write_text("no place for it\n")
    assert "too few for level 'quick'" in expunge(*words, "--prompts", short).complaint()
    assert "one {}" in expunge(*words, "--prompts", bad).complaint()
    assert "no such file" in expunge(*words, "--prompts", tmp_path / "none.txt").complaint()
    audit = ("certify", run, "--concept", "red", "--level", "audit", "--suite", suite, "--prompts", lines)
    assert (
        "64 prompts are too few for level 'audit', which needs 5000; legal: a lower level, or --prompts"
        in expunge(*audit).complaint()
    )
    other = ("certify", run, "--concept", "blue", "--level", "quick", "--suite", suite, "--prompts", lines)
    assert "erased red, not 'blue'" in expunge(*other).complaint()
    assert "no packaged suite" in expunge("certify", run, "--concept", "red").complaint()
    assert "no artifact" in expunge("certify", "tiny-unet", "--concept", "red", "--suite", suite).complaint()
    assert "phrase of the concept" in expunge(*words, "--prompts", lines, "--anchor", "red").complaint()
    assert (
        "DDIMScheduler has none there: draw with --noise-floor"
        in expunge(*words, "--prompts", lines, "--path").complaint()
    )
    assert "noise floor is 2.0" in expunge(*words, "--prompts", lines, "--noise-floor", 2).complaint()

    def uncalibrated(self: Colour, concept: Concept) -> OperatingPoint | None:
        return None

    monkeypatch.setattr(Colour, "operating_point", uncalibrated)
    assert "'colour' is not calibrated for 'red'" in expunge(*words, "--prompts", lines).complaint()
    assert not (run / "leakage").exists()
