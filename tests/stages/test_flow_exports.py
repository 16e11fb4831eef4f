"""Exports of SD3 and FLUX.1: the file, loaded by the tool it is for, draws what our view draws."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expunge.core.errors import InputError
from expunge.models.load import load
from expunge.models.original import UNET, checkpoint
from expunge.patches.guard import GuardPatch, PassGuard
from expunge.patches.lowrank import LowRankPatch
from expunge.stages import artifact
from expunge.stages.export import export
from stages.exports import change, cross, drawn, folder, joint, made, stock
from stages.test_artifact import Nudge
from stages.test_export import same

FLOWS = ("tiny-sd3", "tiny-flux", "tiny-flux-distilled")
# What diffusers says about parts of the pipeline that a LoRA file leaves alone goes to its log, not to us.


@pytest.mark.parametrize("model", FLOWS)
def test_a_full_change_as_lora_of_full_rank(model: str, tmp_path: Path) -> None:
    source, view = made(tmp_path, model, change(load(model), joint))
    done = export(source, "lora", rank=1000)
    assert done.error < 1e-5 and set(done.layers) == set(view.weights) and not done.left_out and not done.notes
    assert all(name.startswith("transformer.") for name in load_file(done.path))
    pipeline = stock(model)
    pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, model)


@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-flux"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # what the note of the export says
def test_whole_layers_with_biases_as_lora(model: str, tmp_path: Path) -> None:
    def fits(path: str) -> bool:
        return path.startswith("transformer.") and ".norm_" not in path

    patch = change(load(model), fits, size=0.05)
    source, view = made(tmp_path, model, patch)
    done = export(source, "lora", rank=1000)
    assert not done.left_out and any(path.endswith(".bias") for path in patch.deltas)
    assert any("fuse_lora" in note for note in done.notes)
    pipeline = stock(model)
    pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, model)


@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-flux"])
def test_an_extracted_rank_says_what_it_loses(model: str, tmp_path: Path) -> None:
    patch = change(load(model), joint)
    source, _ = made(tmp_path, model, patch)
    done = export(source, "lora", rank=2)
    stored, total, lost = load_file(done.path), 0.0, 0.0
    for path, delta in patch.deltas.items():
        module = path.removesuffix(".weight")
        rest = delta - stored[f"{module}.lora_B.weight"] @ stored[f"{module}.lora_A.weight"]
        assert done.layers[path] == pytest.approx(float(rest.norm() / delta.norm()), rel=1e-4)
        total, lost = total + float(delta.square().sum()), lost + float(rest.square().sum())
    assert done.error == pytest.approx((lost / total) ** 0.5, rel=1e-4) and done.error > 0.1
    assert any(note.startswith("rank 2 keeps all but") for note in done.notes)
    with safe_open(done.path, "pt") as stream:
        assert float(stream.metadata()["reconstruction_error"]) == pytest.approx(done.error, rel=1e-4)


def test_low_rank_factors_keep_alpha_and_rank(tmp_path: Path) -> None:
    model, rng = load("tiny-flux"), torch.Generator().manual_seed(0)
    paths = [
        path for path in model.select("cross_attention") if path.endswith(("attn.to_q.weight", "add_v_proj.weight"))
    ]
    factors = {}
    for rank, path in enumerate(paths, start=1):
        weight = model.weight(path)
        pair = (
            torch.randn(rank, weight.shape[1], generator=rng),
            0.1 * torch.randn(weight.shape[0], rank, generator=rng),
        )
        factors[path] = pair
    source, view = made(tmp_path, "tiny-flux", LowRankPatch(factors))
    done = export(source, "lora")
    assert (done.rank, done.error) == (len(paths), 0.0)
    with safe_open(done.path, "pt") as stream:
        facts = json.loads(stream.metadata()["lora_adapter_metadata"])
    assert facts["transformer.r"] == facts["transformer.lora_alpha"] == len(paths)
    pipeline = stock("tiny-flux")
    pipeline.load_lora_weights(done.path)
    same(drawn(pipeline), view, "tiny-flux")


def native(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Add a `.diff` file to a checkpoint by ComfyUI's rule for native names; knows nothing of expunge."""
    result = dict(state)
    for key, tensor in load_file(file).items():
        assert key.startswith("diffusion_model.")
        module, _, kind = ("model." + key).rpartition(".")
        name = f"{module}.{ {'diff': 'weight', 'diff_b': 'bias'}[kind] }"
        assert result[name].shape == tensor.shape
        result[name] = result[name] + tensor
    return result


@pytest.mark.parametrize("model", ["sd3", "tiny-flux-distilled"])
def test_full_differences_under_native_names(model: str, tmp_path: Path) -> None:
    name = folder(model, tmp_path / "base")
    base = load(name)
    patch = change(base, lambda path: path.startswith("transformer."), size=0.05)
    source, _ = made(tmp_path, name, patch)
    done = export(source, "comfy-diff")
    # newer ComfyUI renames FLUX' norms when it loads them; what cannot be named for sure is not written
    assert set(done.left_out) == {path for path in patch.deltas if ".attn.norm_" in path and base.flux}
    assert (done.error > 0) == base.flux
    kept = type(patch)({path: delta for path, delta in patch.deltas.items() if path not in done.left_out})
    state = {key: tensor.clone() for key, tensor in checkpoint(base).items()}
    save_file(native(done.path, state), tmp_path / "one.safetensors")
    view = kept.on(base)
    same(load(f"{tmp_path / 'one.safetensors'}@{name}").generate(**ASKED), view, name)


ASKED: dict[str, Any] = {
    "prompts": ["a photo of a cat", "a red guitar"],
    "seeds": [1, 2],
    "guidance_scale": 3.0,
    "steps": 3,
}
PIPELINES = {
    "tiny-unet": StableDiffusionPipeline,
    "openclip": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "tiny-flux": FluxPipeline,
    "tiny-flux-distilled": FluxPipeline,
}


class AnyWidth:
    """torch for diffusers' reader of FLUX files, which has the width 3072 written into its one `torch.split`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def split(self, tensor: torch.Tensor, sizes: tuple[int, ...], dim: int) -> tuple[torch.Tensor, ...]:
        assert sizes == (3072, 3072, 3072, 12288)
        return torch.split(tensor, [tensor.shape[0] * size // 21504 for size in sizes], dim=dim)


@pytest.mark.parametrize("model", PIPELINES)
def test_a_merged_file_comes_back(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our own reader and by stock diffusers'."""
    name = folder(model, tmp_path / "base")
    base = load(name)
    source, view = made(tmp_path, name, change(base, cross if base.family == "unet" else joint))
    done = export(source, "merged")
    again = load(f"{done.path}@{name}")
    assert {path: tensor.shape for path, tensor in again.parameters_by_path().items()} == {
        path: tensor.shape for path, tensor in view.parameters_by_path().items()
    }
    same(again.generate(**ASKED), view, name)
    if model.startswith("tiny-flux"):
        monkeypatch.setattr(single_file_utils, "torch", AnyWidth())
    pipeline = PIPELINES[model].from_single_file(str(done.path), config=str(name), local_files_only=True)
    same(drawn(pipeline), view, name)


@pytest.mark.parametrize("model", FLOWS)
def test_a_pipeline_folder_comes_back(model: str, tmp_path: Path) -> None:
    source, view = made(tmp_path, model, change(load(model), joint))
    place = export(source, "pipeline").path
    kind = StableDiffusion3Pipeline if model == "tiny-sd3" else FluxPipeline
    same(drawn(kind.from_pretrained(str(place), local_files_only=True)), view, model)


def test_an_artifact_of_a_single_file_finds_its_base_again(tmp_path: Path) -> None:
    name = folder("tiny-flux", tmp_path / "base")
    state = {key: tensor.clone() for key, tensor in checkpoint(load(name)).items()}
    save_file(state, tmp_path / "one.safetensors", metadata={"licence": "apache-2.0", "attribution": "by Somebody"})
    whole = f"{tmp_path / 'one.safetensors'}@{name}"
    source, view = made(tmp_path / "run", whole, change(load(whole), joint))
    done = export(source, "merged")
    with safe_open(done.path, "pt") as stream:
        assert stream.metadata()["attribution"] == "by Somebody" and stream.metadata()["base"] == whole
    same(load(f"{done.path}@{name}").generate(**ASKED), view, name)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = made(tmp_path / "flux", "tiny-flux", change(load("tiny-flux"), joint))
    for words, expected in (
        ({"to": "kohya"}, "family 'mmdit'; legal: lora"),
        ({"to": "gguf"}, "unknown export format 'gguf'"),
        ({"to": "lora", "rank": 0}, "rank 0 keeps nothing"),
        ({"to": "lora", "base": "tiny-sd3"}, "differs in the tensors it touches"),
        ({"to": "lora", "base": "tiny-flux-distilled"}, "differs in the tensors it touches"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            export(source, **words)
        assert "\n" not in str(caught.value) and not (source / "export").exists()
    monkeypatch.setattr(artifact, "find", lambda package, name: Nudge)
    guard, _ = made(tmp_path / "guard", "tiny-flux", GuardPatch(PassGuard(), {"centre": torch.ones(3)}))
    with pytest.raises(InputError, match="cannot be merged"):
        export(guard, "merged")
    done = export(guard, "lora")
    assert done.format == "guard" and "NOT WEIGHTS" in done.notes[0]


def test_sd3_with_a_projection_has_no_single_file(tmp_path: Path) -> None:
    """Readers take identity for the projection behind the first CLIP, so another one would be lost unseen."""
    source, _ = made(tmp_path, "tiny-sd3", change(load("tiny-sd3"), joint))
    with pytest.raises(InputError, match=r"text_projection.weight' of 'tiny-sd3' is no identity"):
        export(source, "merged")
    assert not (source / "export").exists() or not list((source / "export").iterdir())
    assert UNET + "pos_embed" in checkpoint(load(folder("sd3", tmp_path / "sd3")))
