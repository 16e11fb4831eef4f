"""A training that cannot go on, as a person meets it: one line, exit code 2, and what is kept for going on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from expunge.core.eraser import Run
from expunge.models.tiny import tiny_pipeline
from expunge.ops.fit import fit
from expunge.ops.student import Learner, Student
from expunge.stages import _files
from expunge.stages._training import Training

BRIEF = {"steps": 7, "batch": 1, "pool": 2, "walk": 3}
GAME = {**BRIEF, "share": 1.0, "pairs": 4, "refresh": 3, "turn": 1.0, "lr": 1e-3}
BREAKS = 5
"""The step whose loss, or gradient, is made to fail; states are saved every second step."""
Break = Callable[[Tensor, Learner], Tensor]


def words(method: str, out: Path, model: str | Path = "tiny-unet", **settings: Any) -> list[Any]:
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["erase", model, "--target", "red", "--method", method, *options, "--out", out]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.stages.erase.Training", partial(Training, every=2))


@contextmanager
def failing(method: str, broken: Break, at: int = BREAKS) -> Iterator[None]:
    """Let a method's loss fail at one step."""

    def through(student: Learner, loss: Callable[[int], Tensor], run: Run, **rest: Any) -> None:
        fit(student, lambda n: broken(loss(n), student) if n == at else loss(n), run, **rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"expunge.methods.finetune.{method}.fit", through)
        yield


def nan_loss(loss: Tensor, student: Learner) -> Tensor:
    return loss * float("nan")


def nan_gradient(loss: Tensor, student: Learner) -> Tensor:
    """The same loss, but the root of zero has no slope: one tensor in the middle gets NaN, its neighbours do not."""
    return loss + (0 * student.parameters[len(student.parameters) // 2].sum()).sqrt()


def kept(out: Path) -> dict[str, Tensor]:
    (file,) = (out / "training").glob("*.safetensors")
    return load_file(file)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("method, options", [("esd", BRIEF), pytest.param("score", GAME, marks=pytest.mark.slow)])
@pytest.mark.parametrize("broken, term", [(nan_loss, "loss"), (nan_gradient, "grad_norm")], ids=["loss", "gradient"])
def test_the_state_of_the_last_finite_step_is_kept_and_gone_on_from(
    method: str, options: dict[str, Any], broken: Break, term: str, tmp_path: Path, expunge, monkeypatch
) -> None:
    monkeypatch.setattr("expunge.ops.descent.PORTION", 2**16)  # portions before the broken one move in the same step
    assert expunge(*words(method, tmp_path / "whole", **options)).code == 0
    asked = words(method, tmp_path / "run", **options)
    with failing(method, broken):
        complaint = expunge(*asked).complaint()
    what = "the loss is nan" if broken is nan_loss else "the gradient's norm is nan"
    assert f"{what} at step {BREAKS}; lower lr" in complaint and f"not finite there: {term};" in complaint
    assert str(tmp_path / "run" / "training" / "fit-0.safetensors") in complaint
    assert (tmp_path / "run" / "recipe.toml").exists() and not (tmp_path / "run" / "artifact").exists()

    # nothing but the steps before it is in the state: a training that ends there has the same bits
    fewer = words(method, tmp_path / "fewer", **options)
    monkeypatch.setattr("expunge.stages.erase.Training", partial(Training, every=BREAKS))

    def full(*args: Any, **rest: Any) -> None:
        raise OSError("no disk for the artifact")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"expunge.methods.finetune.{method}.fit", stopped)
        patched.setattr("expunge.stages.artifact.save", full)
        expunge(*fewer).complaint()
    found = kept(tmp_path / "run")
    assert int(found["done"]) == BREAKS and bits(found) == bits(kept(tmp_path / "fewer"))
    assert all(bool(tensor.isfinite().all()) for tensor in found.values() if tensor.is_floating_point())
    rows = _files.read_lines(tmp_path / "run" / "training" / "log.jsonl")
    assert max(row["step"] for row in rows) == BREAKS - 1 and all(row["value"] is not None for row in rows)

    # the same command goes on from there: into the same wall, and where that is gone, to the end of an unbroken run
    with failing(method, broken):
        assert expunge(*asked).complaint() == complaint
    assert bits(kept(tmp_path / "run")) == bits(found)
    assert expunge(*asked).code == 0
    ends = [load_file(tmp_path / side / "artifact" / "patch.safetensors") for side in ("run", "whole")]
    assert bits(ends[0]) == bits(ends[1])
    assert not (tmp_path / "run" / "training").exists()


def stopped(student: Learner, loss: Callable[[int], Tensor], run: Run, *, steps: int, **rest: Any) -> None:
    fit(student, loss, run, steps=BREAKS, **rest)


def test_a_step_size_without_sense_is_a_line_that_names_step_terms_and_file(tmp_path: Path, expunge) -> None:
    complaint = expunge(*words("score", tmp_path / "run", **{**GAME, "lr": 1e30})).complaint()
    assert " at step 1; lower lr (now 1e+30)" in complaint
    terms = complaint.partition("not finite there: ")[2].partition(";")[0].split(", ")
    assert {"adversarial", "kept", "direction", "loss"} <= set(terms)
    file = tmp_path / "run" / "training" / "fit-0.safetensors"
    assert complaint.endswith(f"is kept in {file}") and int(load_file(file)["done"]) == 1


def test_a_mended_setting_is_another_recipe_and_what_is_there_stays(tmp_path: Path, expunge) -> None:
    expunge(*words("esd", tmp_path / "run", **BRIEF, lr=1e30)).complaint()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    mended = words("esd", tmp_path / "run", **BRIEF, lr=1e-5)
    assert "holds an unfinished training of another recipe" in expunge(*mended).complaint()
    assert "another recipe" in expunge(*words("esd", tmp_path / "run", **BRIEF, lr=1e30), "--seed", 4).complaint()
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    for file in (tmp_path / "run" / "training").iterdir():
        file.unlink()
    assert expunge(*mended).code == 0


def test_a_first_step_that_fails_leaves_nothing(tmp_path: Path, expunge) -> None:
    with failing("esd", nan_loss, at=0):
        assert "the loss is nan at step 0" in expunge(*words("esd", tmp_path / "run", **BRIEF)).complaint()
    assert not (tmp_path / "run").exists()


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path, expunge) -> None:
    expunge(*words("esd", tmp_path / "run", **BRIEF, lr=1e30)).complaint()
    file = tmp_path / "run" / "training" / "fit-0.safetensors"
    with safe_open(file, framework="pt") as found:
        assert found.metadata()["of"]
    file.write_bytes(file.read_bytes()[:-100])
    complaint = expunge(*words("esd", tmp_path / "run", **BRIEF, lr=1e30)).complaint()
    assert "fit-0.safetensors cannot be read" in complaint and "to start anew" in complaint


def test_nothing_to_train_is_refused(tmp_path: Path, expunge, monkeypatch: pytest.MonkeyPatch) -> None:
    single = tiny_pipeline("tiny-flux")  # with no double block nothing is a key or value of the text alone
    single.transformer = FluxTransformer2DModel.from_config({**single.transformer.config, "num_layers": 0})
    single.save_pretrained(tmp_path / "single")
    for method, more in (("esd", {"group": "cross_kv"}), ("erase_anything", {"pictures": 2})):
        complaint = expunge(*words(method, tmp_path / "run", tmp_path / "single", **BRIEF, **more)).complaint()
        assert "group 'cross_kv' matches no parameter" in complaint and not (tmp_path / "run").exists()
    assert expunge(*words("esd", tmp_path / "all", tmp_path / "single", **BRIEF, group="all")).code == 0
    # a method that finds nothing by a way of its own does not get past the loop
    monkeypatch.setattr("expunge.methods.finetune.esd.trainable", lambda model, *_, **__: Student(model, {}))
    complaint = expunge(*words("esd", tmp_path / "run", **BRIEF)).complaint()
    assert "nothing of 'tiny-unet' would be trained; choose a group" in complaint
    assert not (tmp_path / "run").exists()
