"""A killed erasure goes on where it was and ends at the same bits; the state of another one is left alone."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.stages._training import Training
from expunge.stages.erase import erase
from expunge.stages.recipe import Recipe, parse

BRIEF = {"steps": 7, "batch": 1, "pool": 2, "walk": 3}
GAME = {**BRIEF, "share": 1.0, "pairs": 4, "refresh": 3, "turn": 1.0}
DRAWN = {"steps": 7, "batch": 1, "pictures": 2, "walk": 3}
METHODS = {
    "esd": BRIEF,
    "all_but_one": BRIEF,
    "ant": {**BRIEF, "maps": 1},
    "score": GAME,
    "fade": GAME,
    "sepme": {**DRAWN, "gradients": "accumulated"},
    "mace": DRAWN,
    "ce_sdwv": BRIEF,
    "erase_anything": {**BRIEF, "pictures": 2},
}
SLOW = ("ant", "fade", "mace", "ce_sdwv")  # loops like those of the others
MODELS = {"erase_anything": "tiny-flux"}


class Killed(BaseException):
    """What no method may catch."""


def recipe(method: str, seed: int = 1) -> Recipe:
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in METHODS[method].items())
    model = MODELS.get(method, "tiny-unet")
    return parse(
        f'seed = {seed}\n[model]\nname = "{model}"\n[method]\nname = "{method}"\n{options}[[target]]\nname = "red"\n'
    )


def killed_after(steps: int) -> Run:
    def progress(label: str, done: int, total: int) -> None:
        if label == "fit" and done == steps:
            raise Killed

    return Run(progress=progress)


def counting(seen: list[int]) -> Run:
    def log(name: str, step: int, value: float) -> None:
        if name == "loss":
            seen.append(step)

    return Run(log=log)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.stages.erase.Training", partial(Training, every=2))


def bits(folder: Path) -> dict[str, list[int]]:
    """Every tensor's bytes; the header names the card, and that the seconds."""
    return {name: t.view(torch.uint8).flatten().tolist() for name, t in load_file(folder / "patch.safetensors").items()}


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in METHODS])
def test_a_killed_erasure_ends_at_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = erase(recipe(method), tmp_path / "whole", Run())
    with pytest.raises(Killed):
        erase(recipe(method), tmp_path / "killed", killed_after(5))
    assert (tmp_path / "killed" / "training").is_dir()
    seen: list[int] = []
    resumed = erase(recipe(method), tmp_path / "killed", counting(seen))
    assert seen == [4, 5, 6]  # saved after steps 0 to 3; the fifth is made again
    assert bits(resumed) == bits(whole)
    assert (resumed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert not (tmp_path / "killed" / "training").exists()


def test_the_state_of_another_seed_is_refused_and_kept(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        erase(recipe("esd"), tmp_path, killed_after(5))
    states = sorted((tmp_path / "training").glob("*.safetensors"))
    (tmp_path / "training" / states[0].name).rename(tmp_path / "training" / "fit-2.safetensors")
    with pytest.raises(InputError, match="unfinished training of another recipe"):
        erase(recipe("esd", seed=2), tmp_path, Run())
    assert (tmp_path / "training" / "fit-2.safetensors").exists()
