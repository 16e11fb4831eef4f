"""Several processes against one that adds gradients up: the same losses, averaged, and the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.stages import artifact
from expunge.stages._files import read_lines
from expunge.stages.erase import erase
from expunge.stages.recipe import Recipe, parse

BRIEF = {"steps": 4, "batch": 2, "pool": 4, "walk": 3}
GAME = {**BRIEF, "share": 1.0, "pairs": 4, "refresh": 2, "turn": 1.0}
METHODS = {"esd": BRIEF, "ant": {**BRIEF, "maps": 1}, "score": GAME}


def words(method: str, out: Path, *more: str) -> list[str]:
    options = [word for name, value in METHODS[method].items() for word in ("--set", f"{name}={value}")]
    return ["erase", "tiny-unet", "--target", "red", "--method", method, *options, "--out", str(out), *more]


def recipe(method: str, accumulate: int | None) -> Recipe:
    options = "".join(f"{name} = {value}\n" for name, value in METHODS[method].items())
    parts = "" if accumulate is None else f"accumulate = {accumulate}\n"
    return parse(
        f"seed = 0\n{parts}[model]\nname='tiny-unet'\n[method]\nname='{method}'\n{options}[[target]]\nname='red'\n"
    )


def launched(out: Path, method: str) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch` with two processes of one thread."""
    # --multi_gpu is its word for several processes; device "cpu" makes them meet on the processor
    start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "expunge.cli"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *words(method, out)], capture_output=True, text=True, timeout=300, env=alone
    )


@pytest.mark.parametrize("method", ["esd", pytest.param("ant", marks=pytest.mark.slow)])
def test_two_processes_make_the_bits_of_one_that_accumulates(method: str, tmp_path: Path) -> None:
    done = launched(tmp_path / "two", method)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("erased red from tiny-unet") == 1
    erase(recipe(method, 2), tmp_path / "one", Run())
    two, one = (load_file(tmp_path / side / "artifact" / "patch.safetensors") for side in ("two", "one"))
    assert two.keys() == one.keys()
    assert all(torch.equal(two[name], one[name]) for name in one)
    losses = [
        [row["value"] for row in read_lines(tmp_path / side / "artifact" / "log.jsonl") if row["name"] == "loss"]
        for side in ("two", "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert artifact.read_card(tmp_path / "two").run.parts == 2
    erase(recipe(method, None), tmp_path / "plain", Run())
    plain = load_file(tmp_path / "plain" / "artifact" / "patch.safetensors")
    assert not all(torch.equal(plain[name], one[name]) for name in one.keys() & plain.keys())


@pytest.mark.slow
def test_a_game_is_played_together(tmp_path: Path) -> None:
    done = launched(tmp_path / "two", "score")
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "two" / "artifact" / "log.jsonl")
    assert [row["step"] for row in rows if row["name"] == "loss"] == [0, 1, 2, 3]


def test_another_number_of_parts_is_another_request_and_no_training_has_none(tmp_path: Path) -> None:
    erase(recipe("esd", 2), tmp_path / "a", Run())
    with pytest.raises(InputError, match="differs in parts"):
        erase(recipe("esd", None), tmp_path / "a", Run())
    with pytest.raises(InputError, match="accumulate is 0"):
        recipe("esd", 0)
    text = "accumulate = 2\n[model]\nname='tiny-unet'\n[method]\nname='uce'\n[[target]]\nname='red'\n"
    with pytest.raises(InputError, match="'uce' trains nothing, so more than one loss a step"):
        erase(parse(text), tmp_path / "b", Run())
    assert not (tmp_path / "b").exists()
