"""Exports: the file, loaded by the tool it is for, draws what our view draws."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expunge.core.errors import InputError
from expunge.models.load import load
from expunge.models.original import checkpoint, kohya_module
from expunge.patches.guard import GuardPatch, PassGuard
from expunge.patches.lowrank import LowRankPatch
from expunge.stages import artifact
from expunge.stages.export import check_unquantised, export
from stages.exports import applied, change, cross, drawn, folder, made, ours, stock
from stages.test_artifact import Nudge

CLOSE = {"atol": 1e-4, "rtol": 0.0}
"""Images lie in [0, 1]; an 8-bit level is 4e-3. Weights agree to float32's rounding, the sampler multiplies it."""

MOVED = 0.02  # what an erased model must differ by, or agreement means nothing
TINY = ("tiny-unet", "tiny-unet-v", "tiny-sdxl")
BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"


def same(images: torch.Tensor, view: Any, model: str | Path) -> None:
    expected, base = ours(view), ours(load(str(model)))
    assert (expected - base).abs().max() > MOVED
    torch.testing.assert_close(images, expected, **CLOSE)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as stream:
        return stream.metadata()


@pytest.mark.parametrize("to", ["lora", "kohya"])
@pytest.mark.parametrize("model", TINY)
def test_a_full_change_as_lora_of_full_rank(model: str, to: str, tmp_path: Path) -> None:
    source, view = made(tmp_path, model, change(load(model), cross))
    done = export(source, to, rank=1000)
    assert done.rank == 32 and done.error < 1e-5 and max(done.layers.values()) < 1e-5
    assert set(done.layers) == set(view.weights) and not done.left_out and not done.notes
    pipeline = stock(model)
    pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, model)


def test_a_wrong_rank_is_seen_and_said(tmp_path: Path) -> None:
    source, view = made(tmp_path, "tiny-unet", change(load("tiny-unet"), cross))
    done = export(source, "lora", rank=1)
    assert done.rank == 1 and done.error > 0.5 and "rank 1 keeps all but" in done.notes[0]
    assert float(header(done.path)["reconstruction_error"]) == pytest.approx(done.error, rel=1e-4)
    assert json.loads(header(done.path)["reconstruction_error_layers"]) == pytest.approx(dict(done.layers))
    pipeline = stock("tiny-unet")
    pipeline.load_lora_weights(done.path)
    assert (drawn(pipeline) - ours(view)).abs().max() > MOVED


def test_the_error_is_that_of_the_file(tmp_path: Path) -> None:
    patch = change(load("tiny-unet"), lambda path: path == f"{BLOCK}.attn2.to_k.weight")
    source, _ = made(tmp_path, "tiny-unet", patch)
    (path, delta), done = next(iter(patch.deltas.items())), export(source, "kohya", rank=4)
    stored, name = (
        load_file(done.path),
        "lora_unet_" + path.removeprefix("unet.").removesuffix(".weight").replace(".", "_"),
    )
    rest = delta - stored[f"{name}.lora_up.weight"] @ stored[f"{name}.lora_down.weight"]
    assert done.layers[path] == pytest.approx(float(rest.norm() / delta.norm()), rel=1e-4)
    tail = torch.linalg.svdvals(delta)[4:]
    assert done.error == pytest.approx(float(tail.norm() / delta.norm()), rel=1e-4)  # no file of rank 4 is closer


def test_without_a_rank_a_low_one_is_found(tmp_path: Path) -> None:
    model = load("tiny-unet")
    patch = change(model, cross)
    thin = {path: delta[:, :3] @ torch.randn(3, delta.shape[1]) for path, delta in patch.deltas.items()}
    source, view = made(tmp_path, "tiny-unet", type(patch)(thin))
    done = export(source, "lora")
    assert done.rank == 3 and done.error < 1e-5
    pipeline = stock("tiny-unet")
    pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, "tiny-unet")


@pytest.mark.parametrize("to", ["lora", "kohya", "comfy-diff"])
def test_low_rank_factors_of_several_ranks_are_exact(to: str, tmp_path: Path) -> None:
    model = load("tiny-unet")
    rng = torch.Generator().manual_seed(0)
    paths = [f"{BLOCK}.attn2.to_v", f"{BLOCK}.attn1.to_q", "unet.conv_in", "unet.mid_block.resnets.0.conv1"]
    factors = {}
    for rank, path in zip((1, 2, 4, 3), paths, strict=True):
        weight = model.weight(f"{path}.weight")
        down = torch.randn(rank, *weight.shape[1:], generator=rng)
        up = 0.3 * torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=rng)
        factors[f"{path}.weight"] = (down, up)
    source, view = made(tmp_path, "tiny-unet", LowRankPatch(factors))
    done = export(source, to)
    pipeline = stock("tiny-unet")
    if to == "comfy-diff":
        pipeline.unet.load_state_dict(applied(done.path, pipeline.unet.state_dict()))
    else:
        assert (done.rank, done.error) == (4, 0.0)
        pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, "tiny-unet")


def test_a_header_that_is_lost_changes_nothing(tmp_path: Path) -> None:
    source, view = made(tmp_path, "tiny-unet", change(load("tiny-unet"), cross))
    done = export(source, "lora", rank=1000)
    save_file(load_file(done.path), tmp_path / "bare.safetensors")
    pipeline = stock("tiny-unet")
    pipeline.load_lora_weights(tmp_path / "bare.safetensors")
    same(drawn(pipeline), view, "tiny-unet")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # what the note of the export says
def test_convolutions_and_biases_go_into_a_lora(tmp_path: Path) -> None:
    def fits(path: str) -> bool:
        return path.startswith("unet.") and ("conv" in path or "attn2" in path) and "norm" not in path

    source, view = made(tmp_path, "tiny-unet", change(load("tiny-unet"), fits, size=0.1))
    done = export(source, "lora", rank=1000)
    assert done.error < 1e-5 and not done.left_out and any("fuse_lora" in note for note in done.notes)
    pipeline = stock("tiny-unet")
    pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, "tiny-unet")


@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_what_a_lora_cannot_hold_is_named_and_counted(to: str, tmp_path: Path) -> None:
    patch = change(load("tiny-unet"), lambda path: path.startswith(BLOCK), size=0.1)
    source, _ = made(tmp_path, "tiny-unet", patch)
    done = export(source, to, rank=1000)
    lost = {path for path in patch.deltas if "norm" in path or (to == "kohya" and path.endswith("bias"))}
    assert set(done.left_out) == lost and set(json.loads(header(done.path)["left_out"])) == lost
    assert done.notes[0].startswith(f"NOT IN THIS FILE: {len(lost)} changed tensors") and min(lost) in done.notes[0]
    assert f"and {len(lost) - 4} more" in done.notes[0]
    norms = {path: float(delta.norm()) for path, delta in patch.deltas.items()}
    share = sum(norms[path] ** 2 for path in lost) ** 0.5 / sum(norm**2 for norm in norms.values()) ** 0.5
    assert done.error == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("model", ["tiny-unet", "sdxl"])
@pytest.mark.parametrize("to", ["kohya", "comfy-diff"])
def test_an_independent_loader_applies_the_file(model: str, to: str, tmp_path: Path) -> None:
    """SD's keys are diffusers' names, SDXL's the original ones, so the file goes onto a checkpoint in that layout."""
    name = folder(model, tmp_path / "base")
    whole = to == "comfy-diff"
    patch = change(
        load(name), lambda path: path.startswith("unet.") if whole else cross(path), size=0.1 if whole else 0.5
    )
    source, view = made(tmp_path, name, patch)
    done = export(source, to, rank=None if whole else 1000)
    assert not done.left_out and not done.notes
    if model == "tiny-unet":
        pipeline = stock(name)
        pipeline.unet.load_state_dict(applied(done.path, pipeline.unet.state_dict()))
    else:
        assert any(
            key.startswith("lora_unet_input_blocks_3_1_transformer_blocks_0_attn2") for key in load_file(done.path)
        )
        state = {key: tensor.contiguous() for key, tensor in checkpoint(load(name)).items()}
        save_file(applied(done.path, state, "model.diffusion_model."), tmp_path / "one.safetensors")
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(tmp_path / "one.safetensors"), config=str(name), local_files_only=True, add_watermarker=False
        )
    same(drawn(pipeline), view, name)


def test_stock_diffusers_refuses_full_differences(tmp_path: Path) -> None:
    """Which is why `comfy-diff` has its own name, and `lora` exists."""
    source, _ = made(tmp_path, "tiny-unet", change(load("tiny-unet"), cross))
    done = export(source, "comfy-diff")
    with pytest.raises(ValueError, match="not been correctly renamed"):
        stock("tiny-unet").load_lora_weights(done.path)


@pytest.mark.parametrize("model", ["tiny-unet", "tiny-sdxl"])
def test_text_encoders_in_a_lora(model: str, tmp_path: Path) -> None:
    patch = change(
        load(model), lambda path: path.startswith("text_encoder") and path.endswith(("q_proj.weight", "fc1.weight"))
    )
    source, view = made(tmp_path, model, patch)
    done = export(source, "lora", rank=1000)
    assert not done.left_out and len(done.layers) == (8 if model == "tiny-sdxl" else 4)
    pipeline = stock(model)
    pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, model)


@pytest.mark.parametrize("to", ["kohya", "comfy-diff"])
def test_text_encoders_under_kohyas_names(to: str, tmp_path: Path) -> None:
    """Put in by the independent loader: diffusers 0.42 overlooks attention layers of text encoders in such files."""
    patch = change(load("tiny-unet"), lambda path: path.startswith("text_encoder."), size=0.1)
    source, _ = made(tmp_path, "tiny-unet", patch)
    done = export(source, to, rank=1000 if to == "kohya" else None)
    held = {path for path in patch.deltas if ".self_attn." in path or ".mlp." in path}
    held = {path for path in held if to == "comfy-diff" or path.endswith("weight")}
    assert set(done.layers) == held and set(done.left_out) == set(patch.deltas) - held
    base, pipeline = stock("tiny-unet").text_encoder.state_dict(), stock("tiny-unet")
    state = applied(done.path, base, head="lora_te_text_model_")
    for path in patch.deltas:
        name = path.removeprefix("text_encoder.")
        expected = base[name] + patch.deltas[path] if path in held else base[name]
        torch.testing.assert_close(state[name], expected, atol=1e-5, rtol=1e-5)
    pipeline.text_encoder.load_state_dict(state)


@pytest.mark.parametrize("model", TINY)
def test_a_pipeline_folder(model: str, tmp_path: Path) -> None:
    source, view = made(tmp_path, model, change(load(model), lambda path: path.startswith("unet."), size=0.1))
    done = export(source, "pipeline")
    kind = StableDiffusionXLPipeline if model == "tiny-sdxl" else StableDiffusionPipeline
    same(drawn(kind.from_pretrained(done.path, use_safetensors=True)), view, model)
    assert torch.equal(ours(load(done.path)), ours(view))
    assert "license: none" in (done.path / "README.md").read_text()
    assert not list(done.path.rglob("*.bin"))


@pytest.mark.parametrize("model", ["tiny-unet", "tiny-unet-v", "openclip", "sdxl"])
def test_one_file_in_the_original_layout(model: str, tmp_path: Path) -> None:
    name = folder(model, tmp_path / "base")
    patch = change(load(name), lambda path: path.startswith(("unet.", "text_encoder")), size=0.1)
    source, view = made(tmp_path, name, patch)
    done = export(source, "merged")
    kind = StableDiffusionXLPipeline if model == "sdxl" else StableDiffusionPipeline
    more = {"add_watermarker": False} if model == "sdxl" else {"safety_checker": None}
    pipeline = kind.from_single_file(str(done.path), config=str(name), local_files_only=True, **more)
    same(drawn(pipeline), view, name)
    # every tensor arrived, also those three steps of a toy may not show
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for path, tensor in (getattr(pipeline, part, None) or torch.nn.Module()).named_parameters():
            assert torch.equal(tensor, view.weight(f"{part}.{path}")), path


def predicting(model: str, place: Path, kind: str, **more: bool) -> Path:
    """A folder whose scheduler takes the network's answers for this kind of prediction."""
    file = folder(model, place) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": kind, **more}))
    return place


@pytest.mark.parametrize("model", ["tiny-unet", "sdxl"])
@pytest.mark.parametrize(("kind", "other"), [("epsilon", "v_prediction"), ("v_prediction", "epsilon")])
def test_a_merged_file_is_not_taken_for_another_prediction(model: str, kind: str, other: str, tmp_path: Path) -> None:
    """Where header and folder disagree, every picture would be rubbish; where they agree, it is the view's."""
    base, wrong = predicting(model, tmp_path / "base", kind), predicting(model, tmp_path / "wrong", other)
    source, view = made(tmp_path, base, change(load(base), cross))
    file = export(source, "merged").path
    same(ours(load(f"{file}@{base}")), view, base)
    with pytest.raises(InputError) as caught:
        load(f"{file}@{wrong}")
    assert f"says that it predicts {kind!r}" in str(caught.value) and f"takes it for {other!r}" in str(caught.value)
    assert "\n" not in str(caught.value) and "wrong/scheduler/scheduler_config.json" in str(caught.value)
    silent = tmp_path / "silent.safetensors"  # as most people's files are: the folder is believed
    save_file({key: tensor for key, tensor in load_file(file).items() if key != "v_pred"}, silent)
    assert (ours(load(f"{silent}@{wrong}")) - ours(view)).abs().max() > MOVED


def test_marks_of_v_prediction_are_written_and_read(tmp_path: Path) -> None:
    """ComfyUI and Forge look for tensors, kohya writes a word of its own; each alone is enough."""
    base = predicting("sdxl", tmp_path / "base", "v_prediction", rescale_betas_zero_snr=True)
    source, _ = made(tmp_path, base, change(load(base), cross))
    found = load_file(export(source, "merged").path)
    assert found["v_pred"].numel() == found["ztsnr"].numel() == 0
    eps = predicting("sdxl", tmp_path / "eps", "epsilon")
    flat = predicting("sdxl", tmp_path / "flat", "v_prediction")
    weights = {name: tensor for name, tensor in found.items() if name not in ("v_pred", "ztsnr")}
    for mark, about, wrong, words in (
        (["v_pred"], {}, eps, "predicts 'v_prediction'"),
        ([], {"modelspec.prediction_type": "v"}, eps, "predicts 'v'"),
        (["ztsnr"], {}, flat, "has no rescale_betas_zero_snr"),
    ):
        file = tmp_path / "marked.safetensors"
        save_file({**weights, **{name: found[name] for name in mark}}, file, metadata=about)
        assert load(f"{file}@{base}").scheduler.config.prediction_type == "v_prediction"
        with pytest.raises(InputError, match=words):
            load(f"{file}@{wrong}")


@pytest.mark.parametrize("to", ["lora", "kohya", "comfy-diff", "merged"])
def test_files_say_what_they_are(to: str, tmp_path: Path) -> None:
    source, _ = made(tmp_path, "tiny-unet", change(load("tiny-unet"), cross))
    card, done = artifact.read_card(source), export(source, to)
    found = header(done.path)
    assert done.path == source / "export" / f"nudge-red-{to}.safetensors"
    assert (found["base"], found["base_sha256"], found["patch_sha256"]) == (
        "tiny-unet", card.base.sha256, card.patch.sha256,
    )  # fmt: skip
    assert (found["method"], found["concept"], found["anchor"], found["licence"]) == ("nudge", "red", "blue", "none")
    assert done.bytes == done.path.stat().st_size
    if to == "lora":
        facts = json.loads(found["lora_adapter_metadata"])
        assert facts["unet.r"] == facts["unet.lora_alpha"] == int(found["rank"]) == done.rank
    if to == "kohya":
        alphas = {float(tensor) for key, tensor in load_file(done.path).items() if key.endswith(".alpha")}
        assert alphas == {float(done.rank)}


def test_credits_of_the_base_travel_along(tmp_path: Path) -> None:
    name = folder("tiny-unet", tmp_path / "base")
    (name / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# base\n\nPictures by Somebody.\n")
    (name / "LICENSE.txt").write_text("the licence")
    source, _ = made(tmp_path, name, change(load(name), cross))
    assert "Pictures by Somebody." in header(export(source, "lora").path)["attribution"]
    place = export(source, "pipeline").path
    assert "Pictures by Somebody." in (place / "README.md").read_text()
    assert (place / "LICENSE.txt").read_text() == "the licence"


def test_equal_artifacts_give_equal_bytes(tmp_path: Path) -> None:
    source, _ = made(tmp_path, "tiny-unet", change(load("tiny-unet"), cross))
    for to in ("kohya", "merged"):
        one, two = (export(source, to, tmp_path / f"{to}{n}.safetensors").path.read_bytes() for n in (1, 2))
        assert one == two


@pytest.mark.parametrize("to", ["lora", "pipeline"])
def test_nothing_is_overwritten_and_nothing_is_half_written(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = made(tmp_path, "tiny-unet", change(load("tiny-unet"), cross))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            export(source, to)
    assert not list((source / "export").iterdir())
    done = export(source, to)
    before = {file: file.read_bytes() for file in (source / "export").rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="nothing is overwritten"):
        export(source, to, done.path)
    assert {file: file.read_bytes() for file in (source / "export").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("to", ["lora", "kohya", "comfy-diff"])
def test_a_guard_is_written_as_card_and_tensors(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "find", lambda package, name: Nudge)
    source, _ = made(tmp_path, "tiny-unet", GuardPatch(PassGuard(), {"centre": torch.ones(3)}, {"limit": 2}))
    done = export(source, to)
    assert done.format == "guard" and done.path.is_dir() and "NOT WEIGHTS" in done.notes[0] and to in done.notes[0]
    assert sorted(file.name for file in done.path.iterdir()) == ["README.md", "card.json", "patch.safetensors"]
    assert torch.equal(artifact.load(done.path).patch.tensors()["centre"], torch.ones(3))
    assert "NOT WEIGHTS" in (done.path / "README.md").read_text()


@pytest.mark.parametrize("to", ["merged", "pipeline"])
def test_a_guard_cannot_be_merged(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "find", lambda package, name: Nudge)
    source, _ = made(tmp_path, "tiny-unet", GuardPatch(PassGuard(), {"centre": torch.ones(3)}))
    with pytest.raises(InputError, match="guard, which is code and cannot be merged"):
        export(source, to)
    assert not (source / "export").exists()


def test_quantised_weights_in_memory_are_refused() -> None:
    model = load("tiny-unet")
    check_unquantised(model)
    layer = model.network.get_submodule(f"{BLOCK}.attn2.to_k")
    layer.weight = torch.nn.Parameter(layer.weight.mul(10).to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="int8"):
        check_unquantised(model)


def test_kohya_names_follow_the_trainers() -> None:
    """Names as they stand in files people share: kohya's SD 1.5 and SDXL trainers."""
    sd, xl = load("tiny-unet"), load("tiny-sdxl")
    down = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert kohya_module(down.replace("blocks.1", "blocks.0", 1), sd) == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"
    )
    # one layer per block here, two in SDXL: block 1 begins at input_blocks 3, there at 4
    assert kohya_module(down, xl) == "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_out_0"
    fc1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_module("text_encoder.encoder.layers.0.mlp.fc1", sd) == fc1
    assert kohya_module("text_encoder.encoder.layers.0.mlp.fc1", xl) == fc1.replace("te_", "te1_", 1)
    assert kohya_module("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", xl) == fc1.replace("te_", "te2_", 1)
    with pytest.raises(InputError, match="vae"):
        kohya_module("vae.encoder.conv_in", sd)
