"""Whatever is wrong with the input: one line that names it, exit code 2, nothing written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expunge.cli.app import run
from expunge.models.tiny import tiny_pipeline

ERASE = ("erase", "tiny-unet", "--target", "cat", "--method", "uce")
RECE, MACE, TRCE = (
    ("erase", "tiny-unet", "--target", "cat", "--method", name, "--set") for name in ("rece", "mace", "trce")
)
BAD = {
    "unknown method": (("erase", "tiny-unet", "--target", "cat", "--method", "usd"), "usd", "uce"),
    "unknown model": (("erase", "tiny-net", "--target", "cat", "--method", "uce"), "tiny-net", "tiny-unet"),
    "unknown field": ((*ERASE, "--set", "ridg=1"), "ridg", "ridge"),
    "field of another type": ((*ERASE, "--set", "ridge=soft"), "soft", "ridge"),
    "field without value": ((*ERASE, "--set", "ridge"), "ridge", "="),
    "anchor equal to target": ((*ERASE, "--anchor", "Cat "), "Cat", "target"),
    "retained target": ((*ERASE, "--retain", "cat"), "cat", "target"),
    "empty target": (("erase", "tiny-unet", "--target", " ", "--method", "uce"), "' '", "NAME"),
    "empty phrase": (("erase", "tiny-unet", "--target", "cat |", "--method", "uce"), "cat |", "NAME"),
    "unknown kind": ((*ERASE, "--kind", "animal"), "animal", "object"),
    "unknown dtype": ((*ERASE, "--dtype", "float8"), "float8", "float32"),
    "unknown device": ((*ERASE, "--device", "tpu"), "tpu", "cpu"),
    "no option value": (("generate", "tiny-unet", "--prompt"), "--prompt", "argument"),
    "missing option": (("erase", "tiny-unet"), "--target", "Missing"),
    "unknown command": (("frobnicate",), "frobnicate", "command"),
    "phrase the tokenizer lacks": (
        ("generate", "tiny-unet", "--prompt", "<|endoftext|>"),
        "endoftext",
        "not know",
    ),
    "no ridge and too few rows": ((*ERASE, "--set", "ridge=0", "--set", "mode=uce2025"), "erase 'cat'", "singular"),
    "no ridge in rece": ((*RECE, "start_ridge=0", "--set", "start_retain_weight=0"), "erase 'cat'", "singular"),
    "no ridge in mace": (
        (*MACE, "ridge=0", "--set", "steps=0", "--set", "prior_weight=0", "--set", "templates=the {}"),
        "erase 'cat'",
        "singular",
    ),
    "no ridge in trce": (
        (*TRCE, "ridge=0", "--set", "prior_weight=0", "--set", 'templates=["{}"]'),
        "erase 'cat'",
        "singular",
    ),
    "a prompt of two targets": ((*ERASE, "--target", "dog | cat"), "'dog'", "share the prompt 'cat'"),
    "a prompt of target and retained": ((*ERASE, "--retain", "dog | cat"), "'dog'", "share the prompt 'cat'"),
    "target within what project holds": (
        ("erase", "tiny-unet", "--target", "cat", "--method", "project", "--set", "min_share=2"),
        "concept 'cat' lies within what is held",
        "retain less",
    ),
    "sentence beyond the window": (
        ("erase", "tiny-unet", "--target", "cat", "--method", "uce", "--set", "templates=" + "a " * 40 + "{}"),
        "concept 'cat'",
        "tokens",
    ),
    "phrase beyond the window": (("erase", "tiny-unet", "--target", "cat " * 40, "--method", "uce"), "cat", "token"),
}


@pytest.mark.parametrize("words, names, also", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(words: tuple[str, ...], names: str, also: str, tmp_path: Path, expunge) -> None:
    out = () if words[-1] in ("--prompt", "frobnicate") else ("--out", tmp_path / "out")
    complaint = expunge(*words, *out).complaint()
    assert names in complaint and also in complaint, complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("behind", ["", "@emoji-unet"])
def test_pickled_checkpoints_are_never_read(behind: str, tmp_path: Path, expunge) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x04N.")
    words = ("--target", "cat", "--method", "uce", "--out", tmp_path / "out")
    complaint = expunge("erase", f"{file}{behind}", *words).complaint()
    assert "model.ckpt" in complaint and "pickled" in complaint and not (tmp_path / "out").exists()


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture(
    params=[("tiny-unet", "unet"), ("tiny-flux", "transformer"), ("tiny-flux", "text_encoder_2")], ids="-".join
)
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    """A folder whose configuration says that one part is quantised, and a method for it."""
    name, part = request.param
    tiny_pipeline(name).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": QUANTISED}))
    return tmp_path / "model", part, {"unet": "uce", "transformer": "erase_anything"}.get(part, "uce")


@pytest.mark.usefixtures("colour")
@pytest.mark.parametrize("verb", ["erase", "plan", "generate", "score"])
def test_a_quantised_model(verb: str, quantised: tuple[Path, str, str], suite: Path, tmp_path: Path, expunge) -> None:
    model, part, method = quantised
    out = ("--out", tmp_path / "out")
    words = {
        "erase": ("--target", "cat", "--method", method, *out),
        "plan": ("--method", method),
        "generate": ("--prompt", "cat", *out),
        "score": ("--suite", suite, *out),
    }[verb]
    complaint = expunge(verb, model, *words).complaint()
    assert f"quantised in part {part!r}" in complaint and "bitsandbytes" in complaint and str(model) in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("score", "--suite", "nope"), ("generate", "--prompt", "cat")], ids=lambda c: c[0])
def test_a_missing_folder_is_no_model(command: tuple[str, ...], tmp_path: Path, expunge) -> None:
    verb, *rest = command
    complaint = expunge(verb, tmp_path / "nowhere", *rest, "--out", tmp_path / "out").complaint()
    assert "nowhere" in complaint or "nope" in complaint
    assert not (tmp_path / "out").exists()


WRONG = {
    "no token": (" ", "no words"),
    "unknown token": ("<|endoftext|>", "does not know"),
    "too long": ("cat " * 40, "at most"),
}


@pytest.mark.parametrize("prompt, says", WRONG.values(), ids=WRONG.keys())
def test_a_prompt_that_cannot_be_read_leaves_the_folder_free(prompt: str, says: str, tmp_path: Path, expunge) -> None:
    words = ("generate", "tiny-unet", "-n", 1, "--steps", 2, "--out", tmp_path / "out", "--prompt")
    assert says in expunge(*words, prompt).complaint()
    assert not (tmp_path / "out").exists()
    assert expunge(*words, "cat").code == 0


def test_an_unknown_model_leaves_the_folder_free(tmp_path: Path, expunge) -> None:
    words = ("--prompt", "cat", "--out", tmp_path / "out")
    assert "tiny-nut" in expunge("generate", "tiny-nut", *words).complaint()
    assert not (tmp_path / "out").exists()


def test_truncated_weights_of_a_model(tmp_path: Path, expunge) -> None:
    from expunge.models.tiny import tiny_pipeline

    tiny_pipeline("tiny-unet").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    words = ("erase", tmp_path / "model", "--target", "cat", "--method", "uce", "--out", tmp_path / "out")
    complaint = expunge(*words).complaint()
    assert file.name in complaint and "truncated" in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_hold_nan(part: str, tmp_path: Path, expunge) -> None:
    from expunge.models.tiny import tiny_pipeline

    pipeline = tiny_pipeline("tiny-unet")
    next(getattr(pipeline, part).parameters()).data.view(-1)[0] = float("nan")
    pipeline.save_pretrained(tmp_path / "model")
    words = ("erase", tmp_path / "model", "--target", "cat", "--method", "uce", "--out", tmp_path / "out")
    complaint = expunge(*words).complaint()
    assert "'cat'" in complaint and f"in {part}." in complaint and "not finite" in complaint
    assert not (tmp_path / "out").exists()


def test_report_of_a_folder_without_scores(tmp_path: Path, expunge) -> None:
    assert "expunge score" in expunge("report", tmp_path).complaint()
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_without_its_parts(tmp_path: Path, expunge) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    words = ("erase", tmp_path / "model", "--target", "cat", "--method", "uce", "--out", tmp_path / "out")
    assert "has no part" in expunge(*words).complaint()
    assert not (tmp_path / "out").exists()


def test_a_truncated_patch(tmp_path: Path, expunge) -> None:
    assert expunge(*ERASE, "--out", tmp_path / "run").code == 0
    patch = tmp_path / "run" / "artifact" / "patch.safetensors"
    patch.write_bytes(patch.read_bytes()[:-100])
    complaint = expunge("generate", tmp_path / "run", "--prompt", "cat", "--out", tmp_path / "out").complaint()
    assert "patch.safetensors" in complaint and "truncated" in complaint


def test_a_torn_card(tmp_path: Path, expunge) -> None:
    assert expunge(*ERASE, "--out", tmp_path / "run").code == 0
    card = tmp_path / "run" / "artifact" / "card.json"
    card.write_text(card.read_text()[:200])
    assert "card.json" in expunge("generate", tmp_path / "run", "--prompt", "cat", "--out", tmp_path / "o").complaint()


def test_an_artifact_whose_base_has_changed(tmp_path: Path, expunge) -> None:
    from expunge.models.tiny import tiny_pipeline

    model = tmp_path / "model"
    tiny_pipeline("tiny-unet", seed=1).save_pretrained(model)
    words = ("erase", model, "--target", "cat", "--method", "uce", "--out", tmp_path / "run")
    assert expunge(*words).code == 0
    tiny_pipeline("tiny-unet", seed=2).save_pretrained(model)
    complaint = expunge("generate", tmp_path / "run", "--prompt", "cat", "--out", tmp_path / "out").complaint()
    assert "was made for base" in complaint


def test_a_full_disk(tmp_path: Path, expunge, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert expunge(*ERASE, "--out", tmp_path / "ok").code == 0  # only the disk is at fault below
    monkeypatch.setattr("expunge.stages._files.os.fsync", full)
    assert "No space left on device" in expunge(*ERASE, "--out", tmp_path / "run").complaint()
    assert [file for file in (tmp_path / "run").rglob("*") if file.is_file()] == []


@pytest.mark.usefixtures("colour")
@pytest.mark.parametrize("verb", ["generate", "score"])
def test_a_full_disk_while_drawing(
    verb: str, suite: Path, tmp_path: Path, expunge, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = os.fsync, tmp_path / "out"
    rest = ("--prompt", "cat", "-n", 2, "--steps", 2) if verb == "generate" else ("--suite", suite, "--target", "blue")
    calls = iter(range(1000))

    def full(handle: int) -> None:
        if next(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr("expunge.stages._files.os.fsync", full)
        assert "No space left on device" in expunge(verb, "tiny-unet", *rest, "--out", out).complaint()
    assert not list(out.rglob(".*"))
    assert expunge(verb, "tiny-unet", *rest, "--out", out).code == 0


def test_a_file_where_a_folder_should_be(tmp_path: Path, expunge) -> None:
    (tmp_path / "file").write_text("mine")
    expunge(*ERASE, "--out", tmp_path / "file").complaint()
    expunge(*ERASE, "--out", tmp_path / "file" / "below").complaint()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m expunge.cli list methods | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_errors_in_our_own_code_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("expunge.cli.listing.catalogue", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["list", "methods"])
