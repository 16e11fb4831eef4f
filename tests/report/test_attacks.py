"""Attacks on the page: every result beside its controls, and none without them."""

import dataclasses
import json
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.core.outcome import Budget, Outcome, Tally
from expunge.ops.stats import clopper_pearson
from expunge.report.page import render
from expunge.stages import _outcomes
from report.made_run import write_run
from report.test_page import plain

HITS = {"untouched": 1, "attack": 7, "null": 0, "random": 2}
OUTCOME = Outcome(
    attack="soft_token",
    paper="arXiv:2308.01508",
    description="Invented.",
    access="embedding",
    threat="T4",
    config={"steps": 50},
    seed=0,
    concept="strawberry",
    method="esd",
    patch_sha256="1" * 64,
    base="tiny-unet",
    base_sha256="0" * 64,
    suite="objects",
    suite_sha256="5" * 64,
    steps=25,
    guidance_scale=4.0,
    asked=10,
    rule="last",
    k=1,
    judge="judge_vit",
    selector=None,
    adaptive=False,
    pictures="emoji world",
    arms={
        **{arm: Tally(rates={"judge_vit": clopper_pearson(hits, 9)}) for arm, hits in HITS.items()},
        "never_knew": Tally(rates={"glyph": clopper_pearson(4, 9)}),
    },
    asr={"judge_vit": clopper_pearson(7, 9)},
    asr_conditional={"judge_vit": None},
    lift={"judge_vit": 7 / 9},
    p_random={"judge_vit": 0.0625},
    half_steps={"attack": 50, "never_knew": None},
    facts={"last_loss": 0.5},
    budget=Budget(
        gradients=200,
        denoiser_forwards=650,
        text_encoder_forwards=70,
        images_generated=9,
        images_judged=9,
        seconds=31.0,
        peak_bytes=1,
        learned_params=192,
        seeds_tried=9,
        target_images=16,
        knows_original_model=True,
        knows_defence=False,
    ),
)


def attacked(tmp_path: Path, outcome: Outcome = OUTCOME) -> Path:
    folder = write_run(tmp_path / "run", arms=("base", "esd"), per_prompt=1)
    _outcomes.write(_outcomes.place(folder / "esd" / "artifact", outcome.attack, "strawberry", single=True), outcome)
    return folder


def test_the_page_shows_an_attack_with_its_controls(tmp_path: Path) -> None:
    text = plain(render(attacked(tmp_path)))
    assert "soft_token (T4) on “strawberry”, not adaptive" in text
    # Clopper-Pearson of 7 of 9: 40 to 97 per cent
    for share in ("1 of 9", "7 of 9 40–97", "0 of 9 0–34", "2 of 9", "4 of 9", "200 gradients, 650 network calls"):
        assert share in text, share


def test_a_page_without_attacks_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arms=("base", "esd"), per_prompt=1)
    assert "None was tried: expunge attack DIR --attack NAME ." in plain(render(folder))


def test_results_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    assert _outcomes.read(attacked(tmp_path) / "esd") == [OUTCOME]


def test_a_result_without_a_control_makes_no_page(tmp_path: Path) -> None:
    folder = attacked(tmp_path)
    file = folder / "esd" / "attacks" / "soft_token.json"
    data = json.loads(file.read_text())
    del data["arms"]["random"]
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="lacks its random arm"):
        render(folder)


def test_a_result_about_another_artifact_makes_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another artifact"):
        render(attacked(tmp_path, dataclasses.replace(OUTCOME, patch_sha256="9" * 64)))


def test_several_concepts_have_files_of_their_own(tmp_path: Path) -> None:
    place = _outcomes.place(tmp_path / "artifact", "kv_inversion", "Red Berry!", single=False)
    assert place == tmp_path / "attacks" / "kv_inversion-red-berry.json"
