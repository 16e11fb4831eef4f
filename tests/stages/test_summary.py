"""Scores and rates on painted pictures, whose right answers are known."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.records import Arm as Row
from expunge.core.records import Case, Summary
from expunge.stages.sample import Arm, Store, png
from expunge.stages.score import read_image, score
from expunge.stages.summarize import read, summarize
from expunge.suites.load import COLUMNS, Suite, load

RED = ("red",)
SENSITIVITY, SPECIFICITY = 190 / 200, 196 / 200


def paint(colour: str, style: str = "plain") -> torch.Tensor:
    """Draw an 8x8 picture of one colour, with dark rows if striped."""
    image = torch.full((3, 8, 8), 0.1)
    image[("red", "green", "blue").index(colour)] = 0.9
    if style == "striped":
        image[:, ::2] *= 0.3
    return image


def fill(run: Path, suite: Suite, name: str, picture: Callable[[Case], torch.Tensor], **identity: Any) -> None:
    """Write an arm whose pictures are painted instead of drawn."""
    arm = Arm(
        arm=name, suite=suite.name, suite_sha256=suite.digest, model="paint", model_sha256="0" * 64, patch_sha256=None,
        steps=1, guidance_scale=1.0, batch=1,
    )  # fmt: skip
    arm = dataclasses.replace(arm, **identity)
    targets = [target.concept.name for target in suite.targets if target.concept.name in (*RED, "striped")]
    store = Store.open(run / "samples" / suite.name / name, arm, suite, targets)
    cases = [case for target in targets for case in suite.cases_for(target)]
    store.add(cases, [png(picture(case)) for case in cases])


def faithful(case: Case) -> torch.Tensor:
    return paint(case.concept, case.style or "plain")


def erased(case: Case) -> torch.Tensor:
    """No red in 3 of 4 target pictures and in all synonyms; one neighbour lost; no stripes anywhere."""
    if case.role == "retain":
        return paint("red" if case.case_id == "red-green0" else case.concept)
    return paint("red" if case.case_id == "red-t0" else "blue")


@pytest.fixture
def run(tmp_path: Path, suite: Path, colour: type) -> Path:
    folder, loaded = tmp_path / "run", load(suite)
    fill(folder, loaded, "esd", erased)
    fill(folder, loaded, "base", faithful)
    return folder


def rows(summary: Summary) -> dict[str, Row]:
    return {arm.name: arm for arm in summary.arms}


def corrected(rate: float) -> float:
    return min(max((rate + SPECIFICITY - 1) / (SENSITIVITY + SPECIFICITY - 1), 0), 1)


def test_rates_are_the_counts_and_their_correction(run: Path) -> None:
    score(run, Run())
    summarize(run)
    (summary,) = read(run)
    assert [arm.name for arm in summary.arms] == ["base", "esd"]
    base, esd = rows(summary)["base"], rows(summary)["esd"]
    raw = {name: {key: rate.value for key, rate in arm.raw.items()} for name, arm in rows(summary).items()}
    assert raw["base"] == {
        "target_rate": 1.0, "synonym_rate": 1.0, "retain_rate": 1.0, "style_rate": 1.0, "harmonic": 0.0,
    }  # fmt: skip
    assert raw["esd"] == {
        "target_rate": 0.25, "synonym_rate": 0.0, "retain_rate": 7 / 8, "style_rate": 0.5,
        "harmonic": pytest.approx(3 / (1 / 0.75 + 8 / 7 + 1)),
    }  # fmt: skip
    assert esd.rates["target_rate"].value == pytest.approx(corrected(0.25))
    assert esd.rates["retain_rate"].value == pytest.approx(corrected(7 / 8))
    assert (esd.rates["synonym_rate"].value, base.rates["target_rate"].value) == (0.0, 1.0)
    parts = 1 - corrected(0.25), corrected(7 / 8), 1.0
    assert esd.rates["harmonic"].value == pytest.approx(3 / sum(1 / part for part in parts))


def test_every_number_says_where_it_comes_from(run: Path) -> None:
    score(run, Run())
    summarize(run)
    for arm in read(run)[0].arms:
        for key, rate in arm.rates.items():
            assert rate.low <= rate.value <= rate.high and rate.low < rate.high
            assert rate.detector == "colour"
            assert rate.corrected_for == (None if key == "style_rate" else "colour")
            assert arm.raw[key].corrected_for is None and arm.raw[key].detector == "colour"
        assert (arm.rates["target_rate"].n, arm.rates["target_rate"].clusters) == (4, 2)
        assert (arm.rates["retain_rate"].n, arm.rates["retain_rate"].clusters) == (8, 4)


def test_score_rows_hold_value_threshold_decision_and_image(run: Path) -> None:
    path = score(run, Run())
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == 2 * (16 + 8)
    target = next(row for row in found if row["case_id"] == "red-t0" and row["arm"] == "base")
    assert target["value"] == pytest.approx(0.8, abs=0.01) and target["fired"] is True
    files = [path.read_bytes(), (run / "operating_points.json").read_bytes()]
    score(run, Run())
    assert [path.read_bytes(), (run / "operating_points.json").read_bytes()] == files


def test_the_summary_depends_on_files_alone(run: Path) -> None:
    score(run, Run(seed=1))
    once = summarize(run).read_bytes()
    assert summarize(run).read_bytes() == once
    assert once.endswith(b"}\n") and json.loads(once)["schema"] == 1


def test_an_interrupted_scoring_goes_on(run: Path, colour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = colour.score, []

    def dies(self: Any, images: torch.Tensor, concept: Any) -> torch.Tensor:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(concept.name)
        return real(self, images, concept)

    with monkeypatch.context() as patched:
        patched.setattr(colour, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            score(run, Run())
    kept = len((run / "scores.jsonl").read_text().splitlines())
    assert 0 < kept < 48
    with pytest.raises(InputError, match=r"scores\.jsonl does not cover"):
        summarize(run)
    half = score(run, Run()).read_bytes()
    (run / "scores.jsonl").unlink()
    assert score(run, Run()).read_bytes() == half


def test_a_repainted_image_is_scored_anew_and_a_swapped_one_refused(run: Path, suite: Path) -> None:
    score(run, Run())
    fill(run, load(suite), "esd", faithful)
    with pytest.raises(InputError, match="does not cover the images"):
        summarize(run)
    score(run, Run())
    summarize(run)
    assert rows(read(run)[0])["esd"].raw["target_rate"].value == 1.0
    image = next((run / "samples" / "colours" / "esd").glob("*.png"))
    image.write_bytes(png(paint("green")))
    (run / "scores.jsonl").unlink()
    with pytest.raises(InputError, match="not the image its index names"):
        score(run, Run())


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        ({"suite_sha256": "1" * 64}, "two versions of suite 'colours'"),
        ({"model_sha256": "1" * 64}, "from another base model than arm 'base'"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(
    tmp_path: Path, suite: Path, colour: type, identity: dict[str, str], says: str
) -> None:
    fill(tmp_path, load(suite), "base", faithful)
    fill(tmp_path, load(suite), "esd", erased, **identity)
    score(tmp_path, Run())
    with pytest.raises(InputError, match=says):
        summarize(tmp_path)


def test_incomplete_samples_are_not_scored(run: Path) -> None:
    index = run / "samples" / "colours" / "esd" / "index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="holds 15 of 16 images"):
        score(run, Run())
    index.write_text(index.read_text()[:-20])
    with pytest.raises(InputError, match=r"index\.jsonl, line 15 is not valid JSON"):
        score(run, Run())


def test_without_synonyms_and_styles_those_rates_and_the_mean_are_absent(
    tmp_path: Path, suite: Path, colour: type
) -> None:
    lines = (suite / "cases.csv").read_text().splitlines(keepends=True)
    kept = [line.replace("striped", "").replace("plain", "") for line in lines if ",synonym," not in line]
    (suite / "cases.csv").write_text("".join(kept))
    fill(tmp_path, load(suite), "base", faithful)
    score(tmp_path, Run())
    summarize(tmp_path)
    assert set(read(tmp_path)[0].arms[0].rates) == {"target_rate", "retain_rate"}


def test_retained_styles_are_not_counted_under_two_names(tmp_path: Path, suite: Path, colour: type) -> None:
    head, _ = (suite / "suite.toml").read_text().split("[[target]]", 1)
    target = '[[target]]\nname = "striped"\nkind = "style"\nretain = ["plain"]\n'
    (suite / "suite.toml").write_text(head + target)
    asked = [("target", "striped"), ("synonym", "striped"), ("retain", "plain")]
    rows = [
        f"{role}{n},striped,{role},{name},{name},,a {name} {role} {n},{n}" for role, name in asked for n in range(4)
    ]
    (suite / "cases.csv").write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    fill(tmp_path / "run", load(suite), "base", lambda case: paint("red", case.style))
    score(tmp_path / "run", Run())
    summarize(tmp_path / "run")
    (summary,) = read(tmp_path / "run")
    (arm,) = summary.arms
    assert set(arm.rates) == {"target_rate", "synonym_rate", "retain_rate", "harmonic"}
    assert arm.rates["retain_rate"].value == 1.0 and arm.rates["retain_rate"].n == 4


def test_a_picture_survives_the_disk_to_within_half_a_level(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    (tmp_path / "x.png").write_bytes(png(image))
    digest = hashlib.sha256(png(image)).hexdigest()
    assert (read_image(tmp_path / "x.png", digest) - image).abs().max() <= 0.5 / 255 + 1e-6
