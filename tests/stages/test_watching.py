"""A training under watch: it ends within its budget, goes on after a kill, and shows what it draws."""

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from expunge.core.concept import Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.models.load import load
from expunge.ops.collateral import Collateral
from expunge.patches.weights import WeightPatch
from expunge.stages import _files, _watching, artifact
from expunge.stages._training import Training
from expunge.stages.erase import erase
from expunge.stages.recipe import Recipe, parse

BRIEF = "steps = 12\nbatch = 1\npool = 2\nwalk = 3\nlr = 1e-4"


def recipe(budget: float | None, *, method: str = "esd", kind: str = "object") -> Recipe:
    held = "" if budget is None else f"budget = {budget}"
    options = BRIEF if method == "esd" else ""
    return parse(
        f"seed = 1\n{held}\n[model]\nname = 'tiny-unet'\n[method]\nname = '{method}'\n{options}\n"
        f"[[target]]\nname = 'red'\nkind = '{kind}'\n[[retain]]\nname = 'blue'\n"
    )


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_watching, "EVERY", 3)
    monkeypatch.setattr("expunge.stages.erase.Training", partial(Training, every=2))


def change(model, made: Path) -> float:
    card = artifact.read_card(made)
    request = Request(target=card.target, anchor=card.anchor, retain=card.retain)
    return Collateral.of(model, request, Run(seed=1))(artifact.load(made).on(model))


def collateral(made: Path) -> list[float]:
    return [row["value"] for row in _files.read_lines(made / "log.jsonl") if row["name"] == "collateral"]


def test_collateral_is_zero_before_and_grows_with_the_square_of_the_change():
    model, request = load("tiny-unet"), Request.of("red", retain=["blue"])
    measure = Collateral.of(model, request, Run())
    assert measure(model) == 0
    path = "unet.conv_out.bias"
    one, two = (WeightPatch({path: torch.full_like(model.weight(path), size)}).on(model) for size in (0.1, 0.2))
    assert measure(two) == pytest.approx(4 * measure(one), rel=1e-4)


def test_a_training_ends_at_the_last_look_within_its_budget(tmp_path: Path):
    free = collateral(erase(recipe(1e9), tmp_path / "free", Run()))
    assert len(free) == 4 and free[0] < free[1] < free[2]
    budget = (free[1] + free[2]) / 2
    made = erase(recipe(budget), tmp_path / "held", Run())
    assert collateral(made) == free[:3]
    model = load("tiny-unet")
    assert change(model, made) == pytest.approx(free[1], rel=1e-3)
    assert change(model, made) <= budget < change(model, tmp_path / "free" / "artifact")
    assert artifact.read_card(made).run.budget == budget


def test_a_killed_training_under_a_budget_ends_at_the_same_bits(tmp_path: Path):
    free = collateral(erase(recipe(1e9), tmp_path / "free", Run()))
    held = recipe((free[1] + free[2]) / 2)
    whole = erase(held, tmp_path / "whole", Run())

    def progress(label: str, done: int, total: int) -> None:
        if label == "fit" and done == 8:  # saved at 8, looked at 6: what was allowed is not what was saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(held, tmp_path / "killed", Run(progress=progress))
    resumed = erase(held, tmp_path / "killed", Run())
    ours, theirs = (artifact.load(folder).patch.tensors() for folder in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_a_budget_that_the_first_look_finds_spent_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(InputError, match=r"after 3 steps, at the first look: collateral change .*, budget 1e-12"):
        erase(recipe(1e-12), tmp_path / "out", Run())
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="at the first look"):
        erase(recipe(1e-12), tmp_path / "seen", Run(), preview=2)
    assert [each.name for each in (tmp_path / "seen").iterdir()] == ["preview"]  # but what was drawn by then


def test_what_trains_nothing_has_no_budget(tmp_path: Path):
    with pytest.raises(InputError, match="'uce' trains nothing, so budget"):
        erase(recipe(0.1, method="uce"), tmp_path / "out", Run())
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"budget is 0\.0; legal: above 0"):
        recipe(0.0)


def test_another_budget_is_another_request(tmp_path: Path):
    erase(recipe(None), tmp_path, Run())
    with pytest.raises(InputError, match="differs in budget"):
        erase(recipe(1e9), tmp_path, Run())


@pytest.mark.parametrize("kind", ["object", "explicit"])
def test_previews_draw_targets_over_what_stays_and_no_explicit_one(tmp_path: Path, kind: str):
    told: list[tuple[str, Path]] = []
    made = erase(recipe(None, kind=kind), tmp_path, Run(), preview=6, show=lambda *words: told.append(words))
    assert [file.name for _, file in told] == ["step-000006.png", "step-000012.png"]
    assert all(("red" in text) is (kind == "object") and "blue" in text for text, _ in told)
    with Image.open(told[-1][1]) as sheet:
        assert (sheet.width, sheet.height) == (4 * 32, 2 * 32)
    plain = erase(recipe(None, kind=kind), tmp_path / "unseen", Run())
    seen, unseen = (artifact.load(folder).patch.tensors() for folder in (made, plain))
    assert all(bool((seen[name] == unseen[name]).all()) for name in unseen)


def test_a_killed_training_may_be_looked_at_when_it_goes_on(tmp_path: Path):
    whole = erase(recipe(None), tmp_path / "whole", Run())

    def progress(label: str, done: int, total: int) -> None:
        if label == "fit" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(recipe(None), tmp_path / "killed", Run(progress=progress))
    resumed = erase(recipe(None), tmp_path / "killed", Run(), preview=6)
    assert (tmp_path / "killed" / "preview" / "step-000012.png").exists()
    ours, theirs = (artifact.load(folder).patch.tensors() for folder in (resumed, whole))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_a_preview_of_negative_steps_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="preview is -1"):
        erase(recipe(None), tmp_path / "out", Run(), preview=-1)
