"""certify where detectors can see: artifacts that end in sentences, exit code 0, and what takes a sentence away."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Result
from cli.painter import painter, write_lines, write_suite
from expunge.core.condition import Condition
from expunge.leakage import twins
from expunge.leakage.record import LeakageCertificate
from expunge.ops.reword import Reworded

PAIRS = 80
RED = ("--target", "red", "--anchor", "green")
UCE = (*RED, "--method", "uce", "--set", "ridge=0.001")
GATE = (*RED, "--method", "gate", "--set", 'others=["chair","tree"]', "--set", "floor=1.0")
Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def small(colour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates of 80 pairs that the painter draws, with the detector of colours and fewer repetitions."""
    monkeypatch.setitem(twins.PAIRS, "quick", PAIRS)
    monkeypatch.setattr("expunge.leakage.pipeline.REPEATS", 3)
    monkeypatch.setattr("expunge.stages._looks.catalogue", lambda package: {"colour": Path(__file__)})
    for stage in ("leakage", "attack"):
        monkeypatch.setattr(f"expunge.stages.{stage}.load_model", painter)


@pytest.fixture
def words(tmp_path: Path) -> tuple[Any, ...]:
    """What follows the folder in every call."""
    lines = write_lines(tmp_path / "lines.txt")
    return ("--concept", "red", "--level", "quick", "--suite", write_suite(tmp_path / "reds"), "--prompts", lines)


def told(result: Result) -> dict[str, Any]:
    assert result.code == 0, result
    data: dict[str, Any] = json.loads(result.out)
    assert LeakageCertificate.of(data).controls.failed == ()
    return data


def test_an_erasure_is_certified_with_its_attacks(expunge: Command, tmp_path: Path, words: tuple[Any, ...]) -> None:
    run = tmp_path / "run"
    assert expunge("erase", "tiny-unet", *UCE, "--out", run).code == 0
    suite = words[words.index("--suite") + 1]
    assert expunge("attack", run, "--attack", "negative_flip", "--suite", suite).code == 0
    data = told(expunge("certify", run, *words, "--json"))
    said = data["verdict"]
    assert said[0].startswith("NO LEAK FOUND by family pixels+latents+colour; would have detected π ≥ ")
    assert said[1].startswith("LEAK ≤ 0.0") and "as seen by detector colour" in said[1]
    # Clopper-Pearson of 0 of 5, one-sided, by hand: 1 - 0.05^(1/5) = 0.4507
    assert said[2:] == ["ATTACK negative_flip@0-gradients+5-pictures: success ≤ 46 % (95 %)"]
    kinds = data["detector"][0]["weakened"]
    # half of each colour has no stronger one, so this detector sees none; one colour stays itself when blurred
    assert min(kinds["plain"][0], kinds["blurred"][0]) > 0.9 and max(kinds["half"][1], kinds["quarter"][1]) < 0.1
    assert 0 < data["lower"]["equivalence"] < 0.3 < data["controls"]["ceiling_bits"]
    (row,) = data["attack"]
    assert (row["N"], row["k"], row["successes"], row["null_rate"], row["lift"]) == (5, 1, 0, 0.0, 0.0)
    assert data["structural"]["kind"] == "none" and data["controls"]["ceiling_bits"] > 0.5
    # a result on another patch is no row of this one's
    file = run / "attacks" / "negative_flip.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_sha256": "0" * 64}))
    assert "was run on patch" in expunge("certify", run, *words).complaint()


def test_an_edit_that_does_nothing_leaks(expunge: Command, tmp_path: Path, words: tuple[Any, ...]) -> None:
    """The side that must fail: a ridge so stiff that no weight moves leaves nearly the whole bit."""
    run = tmp_path / "run"
    assert expunge("erase", "tiny-unet", *RED, "--method", "uce", "--set", "ridge=1e9", "--out", run).code == 0
    first, second = told(expunge("certify", run, *words, "--json"))["verdict"]
    assert first.startswith("LEAK ≥ 0.") and float(first.split()[2]) > 0.5
    assert second.startswith("LEAK ≤ ") and float(second.split()[2]) > 0.5


def test_a_gate_ends_in_the_structural_sentence(expunge: Command, tmp_path: Path, words: tuple[Any, ...]) -> None:
    run = tmp_path / "run"
    assert expunge("erase", "tiny-unet", *GATE, "--out", run).code == 0
    data = told(expunge("certify", run, *words, "--json"))
    row = data["structural"]
    assert (row["kind"], row["misses"], row["n"], row["bitwise_ok"]) == ("gate", 0, PAIRS, True)
    assert row["I_hi"] == pytest.approx(1 - 0.05 ** (1 / PAIRS))  # no miss of n: 1 - delta^(1/n)
    digest = data["scope"]["prompts_hash"][:12]
    assert f"LEAK ≤ 0.037 bits for all observers, prompts {digest}, structural" in data["verdict"]


def test_a_gate_toward_another_anchor_than_the_twins_misses_all(
    expunge: Command, tmp_path: Path, words: tuple[Any, ...]
) -> None:
    run = tmp_path / "run"
    assert expunge("erase", "tiny-unet", *GATE, "--out", run).code == 0
    data = told(expunge("certify", run, *words, "--anchor", "blue", "--json"))
    assert (data["structural"]["misses"], data["structural"]["I_hi"]) == (PAIRS, 1.0)
    assert not any("all observers" in text for text in data["verdict"])


def test_substitution_half_the_way_says_nothing_of_all_observers(
    expunge: Command, tmp_path: Path, words: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert expunge("erase", "tiny-unet", *GATE, "--out", run).code == 0
    exact = Reworded.encode

    def soft(self: Reworded, prompts: list[str]) -> Condition:
        there, here = exact(self, prompts), self.inner.encode(prompts)
        tokens = torch.lerp(here.tokens, there.tokens, 0.99)
        return Condition(tokens=tokens, mask=there.mask, last=there.last)

    monkeypatch.setattr(Reworded, "encode", soft)
    data = told(expunge("certify", run, *words, "--json"))
    row = data["structural"]
    assert (row["kind"], row["misses"], row["I_hi"], row["bitwise_ok"]) == ("gate", 0, 1.0, False)
    assert not any("all observers" in text for text in data["verdict"])
