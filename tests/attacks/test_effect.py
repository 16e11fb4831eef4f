"""Attacks on emoji-unet, a concept and a handful of prompts: slow, and the only place where pictures mean something."""

from pathlib import Path
from typing import Any

import pytest

from cli.conftest import expunge  # noqa: F401  fixture
from expunge.core.attack import Pictures
from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.outcome import Outcome
from expunge.models.load import load
from expunge.stages import _outcomes
from expunge.stages._pictures import owned, real_pictures
from expunge.stages.attack import attack
from expunge.stages.erase import erase
from expunge.stages.recipe import parse

RECIPE = """
[model]
name = "emoji-unet"
[method]
name = "uce"
[[target]]
name = "strawberry"
anchor = { name = "apple" }
[[retain]]
name = "cherries"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("effect") / "berry"
    erase(parse(RECIPE), place, Run(), recorded=False)
    return place


def rates(outcome: Outcome) -> dict[str, float]:
    return {arm: tally.rates[outcome.judge].value for arm, tally in outcome.arms.items() if arm != "never_knew"}


@pytest.mark.slow
def test_inversion_brings_back_what_uce_erased(folder: Path) -> None:
    outcome = _outcomes.load(attack(folder, "kv_inversion", Run(), cases=4))
    found = rates(outcome)
    assert found["attack"] == 1.0 and found["null"] == 0.0 and found["untouched"] <= 0.25
    assert outcome.facts["residual"] < 1e-4


@pytest.mark.slow
def test_relearning_on_real_pictures_has_its_controls(folder: Path) -> None:
    options = ("steps=4", "curve=[2]", "images=4", "batch=2")
    outcome = _outcomes.load(attack(folder, "relearning", Run(), options=options, cases=2))
    assert outcome.pictures == "emoji world" and outcome.budget.target_images == 4
    assert outcome.arms["never_knew"].rates["glyph"].value == 0.0, "four small steps teach no new sign"
    assert not outcome.budget.knows_original_model


@pytest.mark.slow
def test_a_style_is_attacked_before_judges_that_know_it_by_the_suites_name(tmp_path: Path, expunge: Any) -> None:  # noqa: F811
    words = ("emoji-unet", "--target", "a flat picture", "--anchor", "a 3d picture", "--kind", "style")
    assert expunge("erase", *words, "--method", "uce", "--out", tmp_path / "flat").code == 0
    small = {"negative_flip": (), "relearning": ("steps=1", "curve=[]", "images=2", "batch=2")}
    for name, options in small.items():
        settings = [word for option in options for word in ("--set", option)]
        found = expunge("attack", tmp_path / "flat", "--attack", name, "--cases", "1", *settings)
        assert found.code == 0, found
        outcome = _outcomes.load(tmp_path / "flat" / "attacks" / f"{name}.json")
        assert (outcome.concept, outcome.suite) == ("flat", "styles")
        assert {"judge_cnn", "judge_vit"} <= set(outcome.arms["attack"].rates)


def test_real_pictures_are_captioned_with_what_they_show() -> None:
    found = real_pictures(Concept.of("strawberry"), 6)
    assert found.images.shape == (6, 3, 64, 64) and found.images.min() >= 0 and found.images.max() <= 1
    assert all("picture of a strawberry on a" in caption for caption in found.captions)
    assert len(set(found.captions)) > 1
    for phrase in ("ink", "a ink picture"):  # as people phrase a style, and as the suites do
        ink = Concept(name="ink", kind="style", prompts=(phrase,))
        assert all(caption.startswith("a ink picture of a ") for caption in real_pictures(ink, 3).captions)
        drawn = owned(Pictures(source="drawn", count=1), ink, load("tiny-unet"), Run(), guidance_scale=1.0, steps=1)
        assert drawn.captions == ("a ink picture",)
