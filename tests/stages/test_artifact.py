"""Artifacts: whole or not at all, and never on the wrong base."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from expunge.core.card import Card
from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.models.load import load as load_model
from expunge.patches.guard import GuardPatch, PassGuard
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.weights import WeightPatch
from expunge.stages import _provenance, artifact
from expunge.stages._provenance import Code, Source, code, package_sha256, provenance

PATH = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nudge(Eraser):
    """Move one matrix by a fixed random step."""

    paper = "arXiv:0000.00000"
    families = frozenset({"unet"})
    reconstruction = True

    size: float = 0.5

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch:
        weight = model.weight(PATH)
        return WeightPatch({PATH: self.size * torch.randn(weight.shape, generator=run.rng("nudge"))})

    @classmethod
    def restore(cls, tensors: Any, meta: Any) -> GuardPatch:
        return GuardPatch(PassGuard(), dict(tensors), dict(meta))


@pytest.fixture(scope="module")
def model() -> Generator:
    return load_model("tiny-unet")


def job(**options: Any) -> artifact.Job:
    request = Request.of("red", anchor="blue", retain=("green",))
    return artifact.Job(method="nudge", eraser=Nudge(**options), given=tuple(options), request=request, seed=7)


def save(folder: Path, model: Generator, patch: Any = None, **options: Any) -> Path:
    asked = job(**options)
    patch = patch or asked.eraser.erase(model, asked.request, Run(seed=7))
    source = Source(name="tiny-unet", revision="1", licence="none")
    return artifact.save(
        folder, patch, model, asked, source=source, made_by=Code(sha256=None, commit=None, dirty=None), seconds=1.5,
        log=[{"name": "loss", "step": 0, "value": 1.0}],
    )  # fmt: skip


def images(model: Generator) -> torch.Tensor:
    return model.generate(["a photo of red", "a dog"], seeds=[1, 2], guidance_scale=3.0, steps=3)


def test_saved_and_loaded_draws_the_same_images_bit_for_bit(tmp_path: Path, model: Generator) -> None:
    patch = Nudge().erase(model, job().request, Run(seed=7))
    save(tmp_path / "artifact", model, patch)
    expected = images(patch.on(model))
    assert not torch.equal(expected, images(model))
    for folder in (tmp_path, tmp_path / "artifact"):
        assert torch.equal(images(artifact.load(folder).on(load_model("tiny-unet"))), expected)


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux", "tiny-flux-distilled"])
def test_flow_artifacts_come_back_and_refuse_every_other_base(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path = load_model(name), "transformer.context_embedder.weight"
    patch = WeightPatch({path: torch.randn(base.weight(path).shape)})
    save(tmp_path / "artifact", base, patch)
    back = artifact.load(tmp_path)
    assert torch.equal(images(back.on(load_model(name))), images(patch.on(base)))
    assert not torch.equal(images(patch.on(base)), images(base))
    for other in {"tiny-sd3", "tiny-flux", "tiny-flux-distilled", "tiny-unet"} - {name}:
        with pytest.raises(InputError, match=f"was made for base .* {other!r} .* differs"):
            back.on(load_model(other))
    assert back.card.base.family == "mmdit"
    assert back.card.claims.get("guidance_distilled", False) == (name == "tiny-flux-distilled")
    assert artifact.fingerprint(base, {}) == artifact.fingerprint(base.view(), {})
    read = artifact.fingerprint(base, {})
    monkeypatch.setattr(base, "distilled", not base.distilled)
    assert artifact.fingerprint(base, {}) != read  # guards: the same text encoder, another kind of guidance


def test_low_rank_factors_and_guards_come_back(
    tmp_path: Path, model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wide = model.weight(PATH).shape
    factors = LowRankPatch({PATH: (torch.randn(2, wide), torch.randn(out, 2))})
    save(tmp_path / "a", model, factors)
    back = artifact.load(tmp_path / "a")
    assert torch.equal(images(back.on(model)), images(factors.on(model)))
    assert list(back.card.patch.layers) == [PATH]
    monkeypatch.setattr(artifact, "find", lambda package, name: Nudge)
    save(tmp_path / "b", model, GuardPatch(PassGuard(), {"centre": torch.ones(3)}, {"limit": 2}))
    guard = artifact.load(tmp_path / "b")
    assert guard.patch.meta() == {"limit": 2} and torch.equal(guard.patch.tensors()["centre"], torch.ones(3))
    text = {n: p for n, p in model.network.named_parameters() if n.startswith("text_encoder")}
    assert guard.card.base.sha256 == artifact.fingerprint(model, {}) == artifact.fingerprint(model, text)
    assert torch.equal(images(guard.on(model)), images(model))


def test_the_card_says_what_was_asked_and_what_was_changed(tmp_path: Path, model: Generator) -> None:
    patch = Nudge(size=0.25).erase(model, job().request, Run(seed=7))
    folder = save(tmp_path / "artifact", model, patch, size=0.25)
    text = (folder / "card.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    card = Card.from_json(text)
    assert (card.schema, card.method, card.config, card.given) == (1, "nudge", {"size": 0.25}, ("size",))
    assert card.claims["reconstruction"] is True
    assert card.description == "Move one matrix by a fixed random step."
    assert (card.run.seed, card.run.dtype, card.run.seconds, card.run.recorded) == (7, "float32", 1.5, False)
    assert card.run.packages["torch"] == torch.__version__ and card.run.peak_bytes > 1e6
    weight, delta = model.weight(PATH), patch.tensors()[PATH]
    moved = ((weight + delta) - weight).double().norm() / weight.double().norm()
    assert card.patch.layers == {PATH: pytest.approx(float(moved), rel=1e-6)}
    total = sum(parameter.numel() for parameter in model.network.parameters())
    assert card.patch.share == pytest.approx(weight.numel() / total)
    assert card.patch.bytes == (folder / "patch.safetensors").stat().st_size


def test_a_patch_torn_from_its_folder_still_says_what_it_is(tmp_path: Path, model: Generator) -> None:
    folder = save(tmp_path / "artifact", model)
    with safe_open(folder / "patch.safetensors", "pt") as file:
        told, keys = file.metadata(), list(file.keys())
    card = artifact.read_card(folder)
    assert (told["method"], told["base"], told["base_sha256"]) == ("nudge", "tiny-unet", card.base.sha256)
    assert keys == [PATH]
    assert len(told["card"]) == 64


def test_serialized_bytes_depend_on_content_only() -> None:
    tensors, facts = {"b": torch.ones(2, 3), "a": torch.arange(4)}, {key: key for key in "qwertyuiop"}
    assert len({artifact.serialize(tensors, facts) for _ in range(5)}) == 1
    assert artifact.serialize(tensors, facts) != artifact.serialize(tensors, {**facts, "q": "x"})


def test_the_fingerprint_sees_touched_tensors_only(model: Generator) -> None:
    weight = model.weight(PATH)
    found = artifact.fingerprint(model, {PATH: weight})
    other = "unet.conv_in.weight"
    assert artifact.fingerprint(model.view(weights={other: model.weight(other) + 1}), {PATH: weight}) == found
    assert artifact.fingerprint(model.view(weights={PATH: weight + 1e-6}), {PATH: weight}) != found
    assert artifact.fingerprint(model, {PATH: weight, other: weight}) != found


def test_the_wrong_base_is_refused(tmp_path: Path, model: Generator) -> None:
    made = artifact.load(save(tmp_path / "artifact", model))
    for name in ("tiny-unet-v", "tiny-sdxl"):
        with pytest.raises(InputError, match=f"made for base 'tiny-unet' .*'{name}'"):
            made.on(load_model(name))
    with pytest.raises(InputError, match="made for base"):
        made.on(made.on(model))


def test_the_same_weights_read_as_velocity_are_another_base(model: Generator) -> None:
    other = load_model("tiny-unet-v")
    touched = {PATH: model.weight(PATH)}
    assert torch.equal(touched[PATH], other.weight(PATH))
    assert artifact.fingerprint(model, touched) != artifact.fingerprint(other, touched)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "patch.safetensors").write_bytes((f / "patch.safetensors").read_bytes()[:-9]), "truncated"),
        (lambda f: flip(f / "patch.safetensors", -1), "does not match the sha256"),
        (lambda f: (f / "patch.safetensors").unlink(), "no such file"),
        (lambda f: (f / "card.json").write_text((f / "card.json").read_text()[:200]), "not valid JSON"),
        (lambda f: (f / "card.json").write_bytes(b"\xff\xfe"), "card.json"),
        (lambda f: edit(f / "card.json", "method", "esd"), "edited or swapped"),
        (lambda f: edit(f / "card.json", "schema", 2), "schema 2"),
        (lambda f: edit(f / "card.json", "methods", "esd"), "methods"),
        (lambda f: (f / "card.json").unlink(), "no artifact in"),
    ],
)
def test_a_damaged_artifact_is_one_line(tmp_path: Path, model: Generator, damage: Any, says: str) -> None:
    folder = save(tmp_path / "artifact", model)
    damage(folder)
    with pytest.raises(InputError) as caught:
        artifact.load(folder)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def edit(file: Path, key: str, value: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def test_cards_of_two_artifacts_cannot_be_swapped(tmp_path: Path, model: Generator) -> None:
    one, two = save(tmp_path / "a", model, size=0.5), save(tmp_path / "b", model, size=0.25)
    shutil.copy(two / "card.json", one / "card.json")
    with pytest.raises(InputError, match=r"patch\.safetensors"):
        artifact.load(one)


def test_a_finished_folder_is_never_overwritten(tmp_path: Path, model: Generator) -> None:
    folder = save(tmp_path / "artifact", model)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        save(folder, model, size=0.1)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, model: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "artifact", model)
    assert list(tmp_path.iterdir()) == []
    assert artifact.load(save(tmp_path / "artifact", model)).card.method == "nudge"


def test_a_write_the_kernel_cuts_short_leaves_nothing(tmp_path: Path, model: Generator) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path / "artifact", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_provenance_names_the_commit_of_a_checkout() -> None:
    root = Path(artifact.__file__).parent
    asked = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found = code(recorded=True)
    if asked.returncode == 0:
        assert found.commit == asked.stdout.strip()
    run = {"seed": 0, "device": "cpu", "dtype": "float32"}
    assert provenance(Nudge, run, 0.0, found).package_sha256 == package_sha256()
    silent = provenance(Nudge, run, 0.0, code(recorded=False))
    assert (silent.commit, silent.package_sha256, silent.recorded) == (None, None, False)


def test_a_wheel_is_named_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "expunge"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one = 1\n")
    monkeypatch.setattr(_provenance, "ROOT", package)
    monkeypatch.setattr(_provenance, "_pinned_commit", lambda: (None, None))
    found = code(recorded=True)
    assert (found.commit, found.dirty) == (None, None) and found.sha256
    card = provenance(Nudge, {"seed": 0, "device": "cpu", "dtype": "float32"}, 0.0, found)
    assert card.recorded and card.commit is None and card.packages["expunge"]


def test_a_checkout_whose_git_is_silent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "expunge"
    package.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(_provenance, "ROOT", package)
    with pytest.raises(InputError, match="--no-provenance"):
        code(recorded=True)
    assert code(recorded=False).commit is None


def test_the_hash_of_the_sources_sees_names_and_contents(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return package_sha256(tmp_path / name)

    one = tree("a", {"m.py": "1", "sub/n.py": "2", "data.csv": "x"})
    assert one == tree("b", {"sub/n.py": "2", "m.py": "1", "data.csv": "y"})
    assert len({one, tree("c", {"m.py": "2", "sub/n.py": "1"}), tree("d", {"m.py": "1", "sub/o.py": "2"})}) == 3
