"""erase and generate, as a person types them, on the toy model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from expunge.core.card import Card

CAT = ("--target", "cat", "--anchor", "dog", "--method", "uce")


def test_erase_writes_an_artifact_that_says_what_was_asked(tmp_path: Path, expunge) -> None:
    done = expunge(
        "erase", "tiny-unet", "--target", "cat | a small cat", "--anchor", "dog", "--retain", "car", "--method", "uce",
        "--set", "ridge=0.25", "--seed", 3, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert done.code == 0
    told = json.loads(done.out)
    card = Card.from_json((tmp_path / "artifact" / "card.json").read_text())
    assert told["artifact"] == str(tmp_path / "artifact")
    assert told["card"] == json.loads(card.to_json())
    assert card.target[0].prompts == ("cat", "a small cat")
    assert card.anchor[0] is not None and card.anchor[0].name == "dog"
    assert [concept.name for concept in card.retain] == ["car"]
    assert card.config["ridge"] == 0.25 and card.given == ("ridge",) and card.run.seed == 3
    assert all(change > 0 for change in card.patch.layers.values())


def test_several_targets_pair_up_with_their_anchors(tmp_path: Path, expunge) -> None:
    words = ("erase", "tiny-unet", "--target", "cat", "--target", "dog", "--method", "uce", "--out")
    done = expunge(*words, tmp_path / "a", "--anchor", "car", "--anchor", "", "--json")
    anchors = json.loads(done.out)["card"]["anchor"]
    assert anchors[0]["name"] == "car" and anchors[1] is None
    assert "one anchor each" in expunge(*words, tmp_path / "b", "--anchor", "car").complaint()


def test_erasing_again_keeps_what_is_there_and_refuses_another_request(tmp_path: Path, expunge) -> None:
    first = expunge("erase", "tiny-unet", *CAT, "--out", tmp_path, "--json")
    before = (tmp_path / "artifact" / "patch.safetensors").stat().st_mtime_ns
    again = expunge("erase", "tiny-unet", *CAT, "--out", tmp_path, "--json")
    assert first.out == again.out
    other = expunge("erase", "tiny-unet", *CAT, "--set", "ridge=0.1", "--out", tmp_path).complaint()
    assert "choose another folder" in other
    assert (tmp_path / "artifact" / "patch.safetensors").stat().st_mtime_ns == before


def test_generate_draws_the_same_seeds_before_and_after(tmp_path: Path, expunge) -> None:
    assert expunge("erase", "tiny-unet", *CAT, "--out", tmp_path / "run").code == 0
    words = ("--prompt", "a cat", "--prompt", "red", "-n", 2, "--seed", 7, "--steps", 3, "--json", "--out")
    before = json.loads(expunge("generate", "tiny-unet", *words, tmp_path / "before").out)
    after = json.loads(expunge("generate", tmp_path / "run", *words, tmp_path / "after").out)
    assert [(row["prompt"], row["seed"]) for row in before["images"]] == [
        ("a cat", 7), ("a cat", 8), ("red", 7), ("red", 8)
    ]  # fmt: skip
    old, new = ([(tmp_path / p / row["file"]).read_bytes() for row in before["images"]] for p in ("before", "after"))
    assert len(set(old)) == 4
    assert old[0] != new[0]
    with Image.open(before["sheet"]) as sheet, Image.open(tmp_path / "before" / "0000.png") as one:
        assert sheet.width > 2 * one.width and sheet.height > 2 * one.height
    assert [row["from"] for row in after["images"]] == [str(tmp_path / "run")] * 4


def test_generate_continues_and_refuses_a_folder_of_other_images(tmp_path: Path, expunge) -> None:
    words = ("generate", "tiny-unet", "--prompt", "cat", "-n", 2, "--steps", 2, "--out", tmp_path / "out")
    assert expunge(*words).code == 0
    first, second = ((tmp_path / "out" / name).read_bytes() for name in ("0000.png", "0001.png"))
    (tmp_path / "out" / "0001.png").unlink()
    assert expunge(*words).code == 0
    assert (tmp_path / "out" / "0001.png").read_bytes() == second
    assert (tmp_path / "out" / "0000.png").read_bytes() == first
    assert "another request" in expunge(*words, "--seed", 5).complaint()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    assert "not empty" in expunge(*words[:-1], tmp_path / "mine").complaint()
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_ctrl_c_leaves_with_130_and_nothing_half_written(tmp_path: Path) -> None:
    words = (
        "erase",
        "tiny-unet",
        "--target",
        "cat",
        "--method",
        "esd",
        "--set",
        "steps=100000",
        "--out",
        str(tmp_path),
    )
    command = [sys.executable, "-m", "expunge.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not (tmp_path / "recipe.toml").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    time.sleep(1)  # into the training itself
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == "" and "interrupted" in err and "Traceback" not in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recipe.toml"]
