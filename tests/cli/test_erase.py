"""erase and generate, as a person types them, on the toy model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from expunge.core.card import Card
from expunge.core.errors import InputError
from expunge.models.tiny import tiny_pipeline

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
    assert {"residual", "drift", "inversion", "conditioning"} <= {each.name for each in card.certificates}
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


def test_generate_refuses_images_of_other_weights(tmp_path: Path, expunge) -> None:
    words = ("generate", tmp_path / "run", "--prompt", "cat", "-n", 1, "--steps", 2, "--out", tmp_path / "out")
    for ridge in (0.5, 0.1):
        asked = ("erase", "tiny-unet", *CAT, "--set", f"ridge={ridge}", "--out", tmp_path / "run")
        assert expunge(*asked).code == 0
        if ridge == 0.5:
            assert expunge(*words).code == 0
            shutil.rmtree(tmp_path / "run")
    assert "other weights" in expunge(*words).complaint()


def test_a_run_can_go_without_provenance_and_says_so(tmp_path: Path, expunge, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> tuple[None, None]:
        raise InputError("git does not tell its commit; pass --no-provenance to go on")

    monkeypatch.setattr("expunge.stages._provenance.commit", silent)
    words = ("erase", "tiny-unet", *CAT, "--out", tmp_path / "out", "--json")
    assert "--no-provenance" in expunge(*words).complaint()
    assert not (tmp_path / "out").exists()
    card = json.loads(expunge(*words, "--no-provenance").out)["card"]
    assert card["run"]["recorded"] is False and card["run"]["commit"] is None


def test_an_installed_wheel_erases_and_names_its_sources(
    tmp_path: Path, expunge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expunge.stages._provenance.commit", lambda: (None, None))
    card = json.loads(expunge("erase", "tiny-unet", *CAT, "--out", tmp_path, "--json").out)["card"]
    assert card["run"]["recorded"] is True and len(card["run"]["package_sha256"]) == 64


def test_a_recipe_repeats_a_run(tmp_path: Path, expunge) -> None:
    assert expunge("erase", "tiny-unet", *CAT, "--set", "ridge=0.25", "--seed", 3, "--out", tmp_path / "a").code == 0
    words = ("erase", "--recipe", tmp_path / "a" / "recipe.toml", "--out", tmp_path / "b")
    for more in (("--seed", 4), ("--dtype", "float16"), ("--target", "dog"), ("--set", "ridge=1")):
        assert "--recipe says everything" in expunge(*words, *more).complaint()
    assert not (tmp_path / "b").exists()
    assert expunge(*words).code == 0
    one, two = (Card.from_json((tmp_path / name / "artifact" / "card.json").read_text()) for name in "ab")
    assert (one.config, one.target, one.anchor, one.run.seed) == (two.config, two.target, two.anchor, two.run.seed)
    assert one.patch.layers == two.patch.layers
    assert "no such file" in expunge("erase", "--recipe", tmp_path / "c.toml", "--out", tmp_path / "c").complaint()


def test_what_a_method_ignores_is_said(tmp_path: Path, expunge) -> None:
    brief = ("--set", "steps=1", "--set", "pool=2", "--set", "walk=2", "--set", "batch=1")
    words = ("erase", "tiny-unet", "--target", "cat", "--anchor", "dog", "--retain", "car")
    esd = expunge(*words, "--method", "esd", *brief, "--out", tmp_path / "esd")
    assert "esd uses no anchor" in esd.err and "esd uses no retained" in esd.err
    free = ("--set", "retain_weight=0", *brief)
    ours = expunge(*words, "--method", "all_but_one", *free, "--out", tmp_path / "ours")
    assert "all_but_one uses no retained" in ours.err and "anchor" not in ours.err
    uce = expunge(*words, "--method", "uce", "--out", tmp_path / "uce")
    assert "uses no" not in uce.err
    claims = [
        json.loads((tmp_path / name / "artifact" / "card.json").read_text())["claims"]
        for name in ("esd", "ours", "uce")
    ]
    assert [claim["uses_retain"] for claim in claims] == [False, False, True]


def test_anchor_and_retained_are_of_the_targets_kind(tmp_path: Path, expunge) -> None:
    words = ("erase", "tiny-unet", "--target", "red", "--anchor", "blue", "--retain", "green", "--kind", "style")
    card = json.loads(expunge(*words, "--method", "uce", "--out", tmp_path, "--json").out)["card"]
    assert {concept["kind"] for role in ("target", "anchor", "retain") for concept in card[role]} == {"style"}


def test_a_model_folder_means_the_same_from_anywhere(tmp_path: Path, expunge, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pipeline("tiny-unet", seed=1).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    card = json.loads(expunge("erase", "model", *CAT, "--out", tmp_path / "run", "--json").out)["card"]
    assert card["base"]["name"] == str(tmp_path / "model")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    words = ("--prompt", "cat", "-n", 1, "--steps", 2, "--out", tmp_path / "images")
    assert expunge("generate", tmp_path / "run", *words).code == 0


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
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # what a shell starts in the background ignores Ctrl-C, and a child would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
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
