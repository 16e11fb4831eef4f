"""The structure bench on made pictures: what it calls far, unsure and replaced, and what it keeps when it is killed."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from benchmarks import structure
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.suites.load import load

SUITE, RED_TO_BLUE = load("objects"), Request.of("red", anchor="blue")
NAMES = ("red", "green", "blue")
PROMPTS = ["a red", "a red", "one red", "some red"]


class Colours:
    """Sees the mean colour; the more of one colour, the surer."""

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"concept": 8 * self.features(images)}

    def fires(self, images: Tensor, concept: Concept) -> Tensor:
        if concept.name not in NAMES:  # the suite's own concepts: pizza is red here, its anchor blue
            concept = Concept.of("red" if concept.name == "pizza" else "blue")
        return self.features(images).argmax(1) == NAMES.index(concept.name)


def plain(name: str, count: int = 4, strength: float = 1.0) -> Tensor:
    """Pictures of one colour over grey."""
    images = torch.full((count, 3, 4, 4), 0.5 * (1 - strength))
    images[:, NAMES.index(name)] = 0.5 * (1 + strength)
    return images


def test_equal_pictures_are_at_no_distance_and_replaced_ones_at_a_large_one() -> None:
    base = plain("red")
    same = structure.seen(Colours(), base, base, PROMPTS, RED_TO_BLUE)
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    assert (same["target"]["value"], same["anchor"]["value"]) == (1, 0)
    moved = structure.seen(Colours(), plain("blue"), base, PROMPTS, RED_TO_BLUE)
    assert moved["distance"] == pytest.approx(1)
    assert (moved["target"]["value"], moved["anchor"]["value"]) == (0, 1)
    near = structure.seen(Colours(), plain("blue", strength=0.2), base, PROMPTS, RED_TO_BLUE)
    assert same["distance"] < near["distance"] < moved["distance"]


def test_pictures_of_nothing_are_unsure_and_shares_have_intervals_by_prompt() -> None:
    base = plain("red")
    whole, nothing = (
        structure.seen(Colours(), plain("blue", strength=s), base, PROMPTS, RED_TO_BLUE) for s in (1.0, 0.01)
    )
    assert whole["confidence"] > 0.95 and nothing["confidence"] == pytest.approx(1 / 3, abs=0.05)
    mixed = torch.cat([plain("blue", 3), plain("green", 1)])
    share = structure.seen(Colours(), mixed, base, PROMPTS, RED_TO_BLUE)["anchor"]
    assert share["low"] < share["value"] == 0.75 < share["high"] and (share["n"], share["clusters"]) == (4, 3)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bench with pictures that are made: the base draws red, an erased model or a swapped sentence blue."""
    done: list[str] = []

    def drawn(model: str, suite: object, cases: list, swap: tuple[str, str] = ("", "")) -> Tensor:
        return plain("blue" if swap[0] else "red", len(cases))

    def one(arm: str, *_: object) -> tuple[Tensor, float]:
        done.append(arm)
        if arm == "broken":
            raise KeyboardInterrupt
        return plain("blue", 6), 1.0

    monkeypatch.setattr(structure, "load", lambda name: name)
    monkeypatch.setattr(structure, "drawn", drawn)
    monkeypatch.setattr(structure, "one", one)
    return done


def asked(*methods: str) -> Namespace:
    return Namespace(model="emoji-unet", suite="objects", methods=methods, pictures=6)


def test_finished_arms_are_kept_and_not_done_again(tmp_path: Path, job: list[str]) -> None:
    file, judges = tmp_path / "structure.json", {"colours": Colours()}
    with pytest.raises(KeyboardInterrupt):
        structure.fill({}, "pizza", asked("uce", "broken"), judges, file)
    record = structure.read(file)
    assert job == ["anchor", "uce", "broken"] and list(record["pizza"]) == ["base", "anchor", "uce"]
    structure.fill(record, "pizza", asked("uce", "esd"), judges, file)
    assert job[3:] == ["esd"] and structure.read(file) == record
    lines = structure.table(record)
    assert len(lines) == 2 + 4 and "| pizza | `base`, colours | 6 | 0.000 |" in lines[2]
    assert lines[-1].startswith("| pizza | `esd`, colours | 6 | 1.000 |") and lines[-1].endswith(" 100] |")


def test_twins_are_the_same_sentences_about_the_anchor_and_counts_are_checked() -> None:
    class Echo:
        def generate(self, prompts: list[str], **_: object) -> list[str]:
            return prompts

    cases = structure.chosen(SUITE, "pizza", 5)
    assert len({case.case_id for case in cases}) == 5 and {case.role for case in cases} == {"target"}
    prompts = structure.drawn(Echo(), SUITE, cases, ("pizza", "hamburger"))
    assert [text.replace("hamburger", "pizza") for text in prompts] == [case.prompt for case in cases]
    with pytest.raises(SystemExit, match="does not hold 'pie'"):
        structure.drawn(Echo(), SUITE, cases, ("pie", "hamburger"))
    with pytest.raises(SystemExit, match="0 pictures"):
        structure.chosen(SUITE, "pizza", 0)
