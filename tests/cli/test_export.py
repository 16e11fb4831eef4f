"""`expunge export` on the command line: files, what it says, and one line for whatever is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from expunge.models.load import load
from expunge.models.tiny import tiny_pipeline
from expunge.patches.guard import GuardPatch, PassGuard
from expunge.stages import artifact
from stages.exports import change, cross, joint, made
from stages.test_artifact import Nudge


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An artifact of full rank on the toy U-Net."""
    return made(tmp_path / "run", "tiny-unet", change(load("tiny-unet"), cross))[0]


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(artifact, "find", lambda package, name: Nudge)
    return made(tmp_path / "run", "tiny-unet", GuardPatch(PassGuard(), {"centre": torch.ones(3)}))[0]


def test_every_format_is_written_below_the_run(run: Path, expunge) -> None:
    for to in ("lora", "kohya", "comfy-diff", "merged", "pipeline"):
        done = expunge("export", run, "--to", to)
        assert done.code == 0 and f"nudge-red-{to}" in done.out, done
    assert len(list((run / "export").iterdir())) == 5


def test_what_a_lora_loses_is_said(run: Path, expunge) -> None:
    done = expunge("export", run, "--to", "lora", "--rank", 2)
    assert "rank 2, 8 layers, relative error" in done.out and "attn2.to_k.weight" in done.out
    assert "NOTE: rank 2 keeps all but" in done.err


def test_json_holds_every_layer(run: Path, tmp_path: Path, expunge) -> None:
    out = tmp_path / "new" / "mine.safetensors"
    told = json.loads(expunge("export", run / "artifact", "--to", "kohya", "--rank", 2, "--out", out, "--json").out)
    assert (told["path"], told["format"], told["rank"]) == (str(out), "kohya", 2)
    assert len(told["layers"]) == 8 and 0 < told["error"] < 1 and told["bytes"] == out.stat().st_size
    assert len(load_file(out)) == 3 * 8


def test_a_real_eraser_all_the_way(tmp_path: Path, expunge) -> None:
    words = ("erase", "tiny-unet", "--target", "cat", "--method", "uce", "--out", tmp_path / "run")
    assert expunge(*words).code == 0
    told = json.loads(expunge("export", tmp_path / "run", "--to", "lora", "--json").out)
    assert told["error"] < 1e-3 and told["path"].endswith("uce-cat-lora.safetensors")


def test_a_guard_is_announced(guard: Path, expunge) -> None:
    done = expunge("export", guard, "--to", "kohya")
    assert done.code == 0 and "NOTE: THIS ARTIFACT IS A GUARD, NOT WEIGHTS" in done.err
    told = json.loads(expunge("export", guard, "--to", "lora", "--json", "--out", guard / "again").out)
    assert told["format"] == "guard" and "NOT WEIGHTS" in told["notes"][0]


BAD = {
    "unknown format": (("--to", "gguf"), "gguf", "lora"),
    "no format": ((), "--to", "Missing"),
    "rank 0": (("--to", "lora", "--rank", "0"), "rank 0", "1 or more"),
    "negative rank": (("--to", "kohya", "--rank", "-3"), "rank -3", "1 or more"),
    "rank that is no number": (("--to", "lora", "--rank", "two"), "--rank", "integer"),
    "rank where there is none": (("--to", "merged", "--rank", "4"), "merged", "lora"),
    "wrong base": (("--to", "lora", "--base", "tiny-unet-v"), "tiny-unet-v", "was made for base 'tiny-unet'"),
    "base of another shape": (("--to", "merged", "--base", "tiny-sdxl"), "tiny-sdxl", "was made for base"),
    "unknown base": (("--to", "lora", "--base", "tiny-nut"), "tiny-nut", "tiny-unet"),
}


@pytest.mark.parametrize("words, names, also", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(words: tuple[str, ...], names: str, also: str, run: Path, expunge) -> None:
    complaint = expunge("export", run, *words).complaint()
    assert names in complaint and also in complaint, complaint
    assert not (run / "export").exists()


@pytest.mark.parametrize("to", ["merged", "pipeline"])
def test_a_guard_asked_to_merge(to: str, guard: Path, expunge) -> None:
    assert "cannot be merged" in expunge("export", guard, "--to", to).complaint()
    assert not (guard / "export").exists()


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_a_quantised_base(to: str, tmp_path: Path, expunge) -> None:
    model = tmp_path / "model"
    tiny_pipeline("tiny-unet").save_pretrained(model)
    run, _ = made(tmp_path / "run", model, change(load(model), cross))
    file = model / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    complaint = expunge("export", run, "--to", to).complaint()
    assert "quantised" in complaint and "bitsandbytes" in complaint and "unet" in complaint
    assert not (run / "export").exists()


def test_kohya_has_no_names_for_transformers(tmp_path: Path, expunge) -> None:
    run, _ = made(tmp_path / "run", "tiny-flux", change(load("tiny-flux"), joint))
    complaint = expunge("export", run, "--to", "kohya").complaint()
    assert "family 'mmdit'" in complaint and "comfy-diff" in complaint and not (run / "export").exists()


def test_a_base_that_has_changed_or_moved(tmp_path: Path, expunge) -> None:
    model = tmp_path / "model"
    tiny_pipeline("tiny-unet", seed=1).save_pretrained(model)
    run, _ = made(tmp_path / "run", model, change(load(model), cross))
    model.rename(tmp_path / "elsewhere")
    tiny_pipeline("tiny-unet", seed=2).save_pretrained(model)
    assert "was made for base" in expunge("export", run, "--to", "lora").complaint()
    assert expunge("export", run, "--to", "lora", "--base", tmp_path / "elsewhere").code == 0


def test_another_base_with_the_same_text_encoder_is_named_with_its_own_licence(tmp_path: Path, expunge) -> None:
    """A closed form knows the text encoder alone; what it is laid on is not what it was made on."""
    other, run = tmp_path / "other", tmp_path / "run"
    pipeline = tiny_pipeline("tiny-unet")
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(1.5)
    pipeline.save_pretrained(other)
    (other / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nDrawn by somebody.\n")
    assert expunge("erase", "tiny-unet", "--target", "cat", "--method", "uce", "--out", run).code == 0
    revision = artifact.read_card(run).base.revision
    for to in ("lora", "merged", "pipeline"):
        done = expunge("export", run, "--to", to, "--base", other)
        assert done.code == 0 and f"NOTE: made on base 'tiny-unet', written for '{other}'" in done.err
    (file,) = (run / "export").glob("*lora.safetensors")
    with safe_open(file, framework="pt") as found:
        about = found.metadata()
    assert (about["base"], about["licence"]) == (str(other), "cc-by-4.0") and about["base_revision"] != revision
    (folder,) = (run / "export").glob("*pipeline")
    readme = (folder / "README.md").read_text()
    assert "license: cc-by-4.0" in readme and f"Weights of {other}" in readme and "somebody" in readme
    assert revision not in readme and revision in (folder / "expunge-card.json").read_text()  # that is the artifact's
    assert "NOTE: made on" not in expunge("export", run, "--to", "comfy-diff").err


def test_places_that_cannot_be_written(run: Path, tmp_path: Path, expunge) -> None:
    (tmp_path / "mine.safetensors").write_text("mine")
    words = ("export", run, "--to", "lora", "--out")
    assert "nothing is overwritten" in expunge(*words, tmp_path / "mine.safetensors").complaint()
    assert ".safetensors" in expunge(*words, tmp_path / "lora.bin").complaint()
    assert "folder" in expunge("export", run, "--to", "pipeline", "--out", tmp_path / "a.safetensors").complaint()
    expunge(*words, tmp_path / "mine.safetensors" / "below.safetensors").complaint()
    assert (tmp_path / "mine.safetensors").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_what_is_no_artifact(run: Path, tmp_path: Path, expunge) -> None:
    assert "no artifact in" in expunge("export", tmp_path / "nowhere", "--to", "lora").complaint()
    assert "no artifact in" in expunge("export", "tiny-unet", "--to", "lora").complaint()
    patch = run / "artifact" / "patch.safetensors"
    patch.write_bytes(patch.read_bytes()[:-100])
    assert "truncated" in expunge("export", run, "--to", "lora").complaint()
