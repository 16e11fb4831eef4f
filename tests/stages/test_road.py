"""The road erase → sample → score → summarize on the toy model: resumable, atomic, never overwriting."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.models.load import load as load_model
from expunge.models.tiny import tiny_pipeline
from expunge.stages import _files, artifact
from expunge.stages.erase import erase
from expunge.stages.recipe import Recipe, read
from expunge.stages.sample import sample
from expunge.stages.score import score
from expunge.stages.summarize import read as read_summary
from expunge.stages.summarize import summarize
from expunge.suites.load import load as load_suite

RED = ("red",)
DEAD = 2**22 + 1
"""No process: above the largest id that Linux gives."""


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def change(recipe: Recipe, **options: Any) -> Recipe:
    method = dataclasses.replace(recipe.method, options={**recipe.method.options, **options})
    return dataclasses.replace(recipe, method=method)


def test_the_whole_road(tmp_path: Path, suite: Path, recipe: Recipe, colour: type) -> None:
    seen: list[tuple[str, int, int]] = []
    run = Run(progress=lambda label, done, total: seen.append((label, done, total)))
    folder = erase(recipe, tmp_path, run, recorded=False)
    sample(None, suite, tmp_path, run, model="tiny-unet", targets=RED)
    sample(tmp_path, suite, tmp_path, run)
    score(tmp_path, run)
    summarize(tmp_path)
    assert read(tmp_path / "recipe.toml") == recipe
    assert artifact.read_card(folder).given == ("batch", "lr", "pool", "steps", "walk")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log and {"name", "step", "value"} == set(log[0])
    (summary,) = read_summary(tmp_path)
    assert [(arm.name, arm.detector) for arm in summary.arms] == [("base", "colour"), ("esd", "colour")]
    assert summary.targets == RED
    for arm in summary.arms:
        assert set(arm.rates) == {"target_rate", "synonym_rate", "retain_rate", "style_rate", "harmonic"}
        assert arm.rates["target_rate"].n == 4 and arm.rates["target_rate"].clusters == 2
        assert arm.rates["retain_rate"].corrected_for == "colour" and arm.raw["retain_rate"].corrected_for is None
        assert arm.rates["style_rate"].corrected_for is None and arm.rates["style_rate"].detector == "colour"
    assert ("sample esd", 16, 16) in seen and ("score", 48, 48) in seen
    assert {("load tiny-unet", 1, 1), ("load detectors", 1, 1)} <= set(seen)


def test_samples_are_the_models_own_images_and_tell_nothing(tmp_path: Path, suite: Path) -> None:
    folder = sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED, batch=3)
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    cases = load_suite(suite).cases_for("red")
    assert [row["case_id"] for row in rows] == [case.case_id for case in cases]
    drawn = load_model("tiny-unet").generate(
        [case.prompt for case in cases[:3]], seeds=[case.seed for case in cases[:3]], guidance_scale=3.0, steps=3
    )
    for row, image in zip(rows, drawn, strict=False):
        with Image.open(folder / row["file"]) as opened:
            assert opened.info == {} and opened.size == (image.shape[2], image.shape[1])
            stored = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8)
        assert torch.equal(stored, (image * 255).round().byte().permute(1, 2, 0).flatten())
        assert not any(word in row["file"] for word in ("red", "green", "blue", "target", "retain", row["case_id"]))


def test_the_cache_serves_the_same_bytes_without_drawing(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    plain = files(sample(None, suite, tmp_path / "a", Run(), model="tiny-unet", targets=RED))
    assert files(sample(None, suite, tmp_path / "b", Run(), model="tiny-unet", targets=RED, cache=cache)) == plain

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn in spite of the cache")

    monkeypatch.setattr("expunge.models.unet.UNetGenerator.generate", refuse)
    assert files(sample(None, suite, tmp_path / "c", Run(), model="tiny-unet", targets=RED, cache=cache)) == plain
    for other in ({"model": "tiny-unet-v"}, {"batch": 5}, {"targets": ("blue",)}):
        with pytest.raises(AssertionError, match="in spite"):
            asked = {"model": "tiny-unet", "targets": RED, **other}
            sample(None, suite, tmp_path / f"d{len(other)}{next(iter(other))}", Run(), cache=cache, **asked)


def test_finished_stages_do_nothing_again(
    tmp_path: Path, suite: Path, recipe: Recipe, colour: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase(recipe, tmp_path, Run(), recorded=False)
    sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    score(tmp_path, Run())
    before = files(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("done twice")

    monkeypatch.setattr("expunge.models.unet.UNetGenerator.generate", refuse)
    monkeypatch.setattr(colour, "score", refuse)
    monkeypatch.setattr("expunge.methods.finetune.esd.ESD.erase", refuse)
    erase(recipe, tmp_path, Run(), recorded=False)
    sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    score(tmp_path, Run())
    assert files(tmp_path) == before


def test_another_recipe_never_overwrites(tmp_path: Path, recipe: Recipe) -> None:
    erase(recipe, tmp_path, Run(), recorded=False)
    before = files(tmp_path)
    uce = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, name="uce", options={}))
    for other, differs in (
        (uce, "config, method"),
        (change(recipe, steps=3), "config"),
        (dataclasses.replace(recipe, seed=1), "seed"),
        (dataclasses.replace(recipe, retain=()), "request"),
    ):
        with pytest.raises(InputError, match="finished artifact of esd on red") as caught:
            erase(other, tmp_path, Run(), recorded=False)
        assert f"asked for {other.method.name} on red" in str(caught.value)
        assert set(differs.split(", ")) <= set(str(caught.value).split("differs in ")[1].split(":")[0].split(", "))
    assert files(tmp_path) == before


def test_an_artifact_is_not_kept_when_its_base_has_changed(tmp_path: Path, recipe: Recipe) -> None:
    """The folder's name is the same; a tensor that the patch does not touch has moved."""
    folder = tmp_path / "model"
    tiny_pipeline("tiny-unet").save_pretrained(folder)
    asked = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name=str(folder)))
    made = erase(asked, tmp_path / "run", Run(), recorded=False)
    assert erase(asked, tmp_path / "run", Run(), recorded=False) == made
    other = tiny_pipeline("tiny-unet")
    other.vae.decoder.conv_in.bias.data += 0.5
    other.save_pretrained(folder)
    with pytest.raises(InputError, match="weights have changed since"):
        erase(asked, tmp_path / "run", Run(), recorded=False)


def test_no_time_is_spent_before_the_code_is_named(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> tuple[None, None]:
        raise InputError("git does not tell; pass --no-provenance to go on")

    def refuse(*_: Any) -> None:
        raise AssertionError("erased before")

    monkeypatch.setattr("expunge.stages._provenance.commit", silent)
    monkeypatch.setattr("expunge.methods.finetune.esd.ESD.erase", refuse)
    with pytest.raises(InputError, match="--no-provenance"):
        erase(recipe, tmp_path / "run", Run())
    assert not (tmp_path / "run").exists()


def test_the_same_recipe_gives_the_same_patch_bytes(tmp_path: Path, recipe: Recipe) -> None:
    """Only measured seconds and memory may differ between two runs."""
    cards = [artifact.load(erase(recipe, tmp_path / name, Run(), recorded=False)) for name in "ab"]
    one, two = (card.patch.tensors() for card in cards)
    assert one.keys() == two.keys() and all(torch.equal(one[path], two[path]) for path in one)
    assert any(bool(delta.abs().max() > 0) for delta in one.values())


def test_samples_of_another_suite_or_model_are_not_mixed(tmp_path: Path, suite: Path, recipe: Recipe) -> None:
    sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    before = files(tmp_path / "samples")
    with pytest.raises(InputError, match="holds samples with model 'tiny-unet', not 'tiny-unet-v'"):
        sample(None, suite, tmp_path, Run(), model="tiny-unet-v", targets=RED)
    cases = suite / "cases.csv"
    cases.write_text(cases.read_text().replace("a photo of red 1", "a picture of red 1"))
    with pytest.raises(InputError, match="holds samples with suite_sha256"):
        sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    assert files(tmp_path / "samples") == before


def test_more_targets_join_the_base_arm(tmp_path: Path, suite: Path) -> None:
    sample(None, suite, tmp_path / "a", Run(), model="tiny-unet", targets=("blue",))
    grown = sample(None, suite, tmp_path / "a", Run(), model="tiny-unet", targets=RED)
    whole = sample(None, suite, tmp_path / "b", Run(), model="tiny-unet")
    assert files(grown) == files(whole)


def test_a_lost_or_altered_image_is_drawn_again(tmp_path: Path, suite: Path) -> None:
    folder = sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    before = files(folder)
    first, second = sorted(folder.glob("*.png"))[:2]
    first.unlink()
    second.write_bytes(b"torn")
    (folder / f".x.png.{DEAD}.part").write_bytes(b"left behind")
    sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    assert files(folder) == before


def test_what_another_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    theirs, left, folder = (tmp_path / f".{name}.part" for name in (f"a.{os.getppid()}", f"b.{DEAD}", f"c.{DEAD}"))
    for file in (theirs, left):
        file.write_text("x")
    folder.mkdir()
    _files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [theirs]


def test_another_detector_joins_and_an_incomplete_one_is_dropped(
    tmp_path: Path, suite: Path, colour: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"colour": colour, "tint": type("Tint", (colour,), {})}
    monkeypatch.setattr("expunge.stages.score.find", lambda package, name: found[name])

    def seen() -> set[str]:
        summarize(tmp_path)
        return {arm.detector for summary in read_summary(tmp_path) for arm in summary.arms}

    sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    score(tmp_path, Run())
    score(tmp_path, Run(), detectors=("tint",))
    assert seen() == {"colour", "tint"}
    sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=("blue",))
    score(tmp_path, Run())
    assert seen() == {"colour"}


def test_detectors_are_asked_where_they_live(
    tmp_path: Path, suite: Path, colour: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights stay on the CPU whatever the model computes on; "meta" stands for a device that is not there."""
    sample(None, suite, tmp_path, Run(), model="tiny-unet", targets=RED)
    score(tmp_path, Run(device="meta"))
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 24


def test_an_artifact_is_not_asked_about_what_it_did_not_erase(tmp_path: Path, suite: Path, recipe: Recipe) -> None:
    erase(recipe, tmp_path, Run(), recorded=False)
    with pytest.raises(InputError, match="erased red, not 'blue'"):
        sample(tmp_path, suite, tmp_path, Run(), targets=("red", "blue"))
    assert not (tmp_path / "samples").exists()


SCRIPT = """
import sys, torch
from pathlib import Path
from expunge.core.eraser import Run
from expunge.stages.sample import sample
torch.set_num_threads(1)
sample(None, sys.argv[1], Path(sys.argv[2]), Run(), model="tiny-unet", batch=2, cache=Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_continues_to_the_same_bytes(tmp_path: Path, suite: Path) -> None:
    toml = suite / "suite.toml"
    toml.write_text(toml.read_text().replace("steps = 3", "steps = 15"))  # slow enough to be caught half-way
    out, cache = tmp_path / "killed", tmp_path / "cache"
    source = str(Path(artifact.__file__).parents[2])
    words = [sys.executable, "-c", SCRIPT, str(suite), str(out), str(cache)]
    folder = out / "samples" / "colours" / "base"
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": source})
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.png"))) < 3 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    half = len((folder / "index.jsonl").read_text().splitlines())
    assert 0 < half < 28
    again = sample(None, suite, out, Run(), model="tiny-unet", batch=2, cache=cache)
    assert files(again) == files(sample(None, suite, tmp_path / "whole", Run(), model="tiny-unet", batch=2))


def test_a_disk_that_fills_up_while_sampling_keeps_what_is_finished(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, iter(range(1000))

    def full(handle: int) -> None:
        if next(calls) >= 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            sample(None, suite, tmp_path / "a", Run(), model="tiny-unet", targets=RED, batch=2)
    folder = tmp_path / "a" / "samples" / "colours" / "base"
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert 0 < len(index) < 16 and all((folder / row["file"]).exists() for row in index)
    assert not list(folder.glob(".*"))
    whole = sample(None, suite, tmp_path / "b", Run(), model="tiny-unet", targets=RED, batch=2)
    assert files(sample(None, suite, tmp_path / "a", Run(), model="tiny-unet", targets=RED, batch=2)) == files(whole)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"model": "tiny-unit"}, "unknown model 'tiny-unit'; legal:"),
        ({"method": "usd"}, "unknown method 'usd'; legal:"),
        ({"target": "一" * 60}, "tokens"),
        ({"anchor": "red"}, "anchor 'red' is also a target"),
        ({"device": "gpu"}, "device 'gpu'"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    tmp_path: Path, recipe: Recipe, edit: dict[str, str], says: str
) -> None:
    target = recipe.target[0]
    if "anchor" in edit:
        target = dataclasses.replace(target, anchor=dataclasses.replace(recipe.retain[0], name=edit["anchor"]))
    target = dataclasses.replace(target, name=edit.get("target", target.name))
    wrong = dataclasses.replace(
        recipe,
        target=(target,),
        model=dataclasses.replace(recipe.model, name=edit.get("model", "tiny-unet")),
        method=dataclasses.replace(recipe.method, name=edit.get("method", "esd")),
    )
    with pytest.raises(InputError) as caught:
        erase(wrong, tmp_path / "out", Run(device=edit.get("device", "cpu")), recorded=False)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_base_with_holes_is_refused_by_name(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model("tiny-unet")
    path = whole.sites("text_in")[0].path
    torn = whole.weight(path).clone()
    torn[0, 0] = float("nan")
    monkeypatch.setattr("expunge.stages.erase.load_model", lambda name, **_: whole.view(weights={path: torn}))
    with pytest.raises(InputError, match=rf"^cannot erase '\w+': .*{re.escape(path)} that are not finite"):
        erase(recipe, tmp_path / "out", Run(), recorded=False)
    assert not (tmp_path / "out").exists()


def test_bad_questions_are_one_line(tmp_path: Path, suite: Path, recipe: Recipe, colour: type) -> None:
    run = Run()
    for call, says in (
        (lambda: sample(None, "objekts", tmp_path, run, model="tiny-unet"), "unknown suite 'objekts'"),
        (lambda: sample(None, suite, tmp_path, run), "needs the name of a base model"),
        (lambda: sample(None, suite, tmp_path, run, model="tiny-unet", targets=("cat",)), "has no target 'cat'"),
        (lambda: sample(tmp_path / "nowhere", suite, tmp_path, run), "no artifact in"),
        (lambda: score(tmp_path, run), "no samples in"),
        (lambda: summarize(tmp_path), "no scores in"),
    ):
        with pytest.raises(InputError, match=says):
            call()
    assert not (tmp_path / "samples").exists()
    erase(recipe, tmp_path, run, recorded=False)
    with pytest.raises(InputError, match=r"made for base 'tiny-unet' .* 'tiny-unet-v'"):
        sample(tmp_path, suite, tmp_path, run, model="tiny-unet-v")
    sample(tmp_path, suite, tmp_path, run)
    with pytest.raises(InputError, match="unknown detector 'judge'; legal:"):
        score(tmp_path, run, detectors=("judge",))
    score(tmp_path, run)
    with pytest.raises(InputError, match="lacks samples of the base model for red"):
        summarize(tmp_path)
