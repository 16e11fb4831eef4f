"""Attacks on emoji-unet, a concept and a handful of prompts: slow, and the only place where pictures mean something."""

from pathlib import Path

import pytest

from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.outcome import Outcome
from expunge.stages import _outcomes
from expunge.stages._pictures import real_pictures
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


def test_real_pictures_are_captioned_with_what_they_show() -> None:
    found = real_pictures(Concept.of("strawberry"), 6)
    assert found.images.shape == (6, 3, 64, 64) and found.images.min() >= 0 and found.images.max() <= 1
    assert all("picture of a strawberry on a" in caption for caption in found.captions)
    assert len(set(found.captions)) > 1
    styled = real_pictures(Concept(name="ink", kind="style", prompts=("ink",)), 3)
    assert all(caption.startswith("a ink picture of a ") for caption in styled.captions)
