"""What exports are tested with: models of three shapes, patches, stock pipelines, and a loader of our own making."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from expunge.core.generator import Generator
from expunge.models._tiny_text import WINDOW
from expunge.models.load import load
from expunge.models.tiny import tiny_pipeline
from expunge.patches.weights import WeightPatch
from expunge.stages import artifact
from expunge.stages._provenance import Code, Source
from stages.test_artifact import job

PROMPTS, SEEDS = ["a photo of a cat", "a red guitar"], [1, 2]


def drawn(pipeline: Any) -> Tensor:
    """Images of a stock pipeline, by its own call."""
    pipeline.set_progress_bar_config(disable=True)
    rngs = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    asked: dict[str, Any] = {"guidance_scale": 3.0}
    if isinstance(pipeline, FluxPipeline):
        asked |= {"height": 32, "width": 32, "max_sequence_length": WINDOW}
        if not pipeline.transformer.config.guidance_embeds:
            asked |= {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}
    if isinstance(pipeline, StableDiffusion3Pipeline):
        asked["max_sequence_length"] = WINDOW
    return pipeline(PROMPTS, generator=rngs, num_inference_steps=3, output_type="pt", **asked).images


def ours(view: Generator) -> Tensor:
    """Images of a view, by our walk."""
    return view.generate(PROMPTS, seeds=SEEDS, guidance_scale=3.0, steps=3)


def change(model: Generator, fits: Any, *, size: float = 0.5, seed: int = 0) -> WeightPatch:
    """Random full-rank changes of the tensors whose path fits, each `size` of the weight's own spread."""
    rng = torch.Generator().manual_seed(seed)
    found = {path: weight for path, weight in model.network.named_parameters() if fits(path)}
    return WeightPatch(
        {path: size * (weight.std() + 0.1) * torch.randn(weight.shape, generator=rng) for path, weight in found.items()}
    )


def cross(path: str) -> bool:
    """Keys and values of cross-attention: what closed-form edits change."""
    return path.startswith("unet.") and path.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))


def joint(path: str) -> bool:
    """Where text enters a transformer, by both routes, and the text's keys and values behind it."""
    ends = ("add_k_proj.weight", "add_v_proj.weight", "context_embedder.weight", "text_embedder.linear_1.weight")
    return path.startswith("transformer.") and path.endswith(ends)


def folder(name: str, place: Path) -> Path:
    """Save a model as a diffusers folder.

    "openclip" is SD 2.x's encoder (gelu); "sdxl" and "sd3" have encoders of two widths, as the real ones, which is how
    readers of one-file checkpoints tell them apart. SD3 has no projection behind its first CLIP: it is identity.
    """
    pipeline = tiny_pipeline({"openclip": "tiny-unet-v", "sdxl": "tiny-sdxl", "sd3": "tiny-sd3"}.get(name, name))
    if name == "openclip":
        pipeline.text_encoder = CLIPTextModel(text(pipeline, hidden_act="gelu"))
    if name == "sdxl":
        pipeline.text_encoder = CLIPTextModel(text(pipeline, hidden_size=24))
        pipeline.text_encoder_2 = CLIPTextModelWithProjection(text(pipeline, hidden_size=40, hidden_act="gelu"))
    if name == "sd3":
        for suffix, width in (("", 24), ("_2", 40)):
            config = text(pipeline, hidden_size=width, projection_dim=width)
            setattr(pipeline, f"text_encoder{suffix}", CLIPTextModelWithProjection(config))
        torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.save_pretrained(place)
    return place


def text(pipeline: Any, **other: Any) -> CLIPTextConfig:
    torch.manual_seed(0)
    return CLIPTextConfig(**{**pipeline.text_encoder.config.to_dict(), **other})


def stock(model: str | Path) -> Any:
    """A fresh stock pipeline of a toy name or a folder."""
    if not Path(model).is_dir():
        return tiny_pipeline(str(model))
    return load(str(model)).pipeline


def made(place: Path, model: str | Path, patch: Any) -> tuple[Path, Generator]:
    """Save a patch as an artifact of a model; return its folder and the erased view."""
    base, unrecorded = load(str(model)), Code(sha256=None, commit=None, dirty=None)
    source = Source(name=str(model), revision="1", licence="none")
    artifact.save(place / "artifact", patch, base, job(), source=source, made_by=unrecorded, seconds=1.0)
    return place, patch.on(base)


def applied(file: Path, state: Mapping[str, Tensor], prefix: str = "", head: str = "lora_unet_") -> dict[str, Tensor]:
    """Add a kohya or `.diff` file to a part's tensors, by the key rules of the design notes (peers, section 5) alone.

    Knows nothing of expunge: names with underscores, alpha over rank, differences as they are. Unknown keys fail.
    """
    modules = {name.removeprefix(prefix).rpartition(".")[0] for name in state if name.startswith(prefix)}
    names = {head + module.replace(".", "_"): prefix + module for module in modules}
    found, result = load_file(file), dict(state)
    for key, tensor in found.items():
        short, _, kind = key.partition(".")
        if kind in ("lora_up.weight", "alpha"):
            continue
        name = names[short] + {"lora_down.weight": ".weight", "diff": ".weight", "diff_b": ".bias"}[kind]
        if kind == "lora_down.weight":
            scale = found[f"{short}.alpha"].item() / tensor.shape[0]
            tensor = scale * found[f"{short}.lora_up.weight"].flatten(1) @ tensor.flatten(1)
        result[name] = result[name] + tensor.reshape(result[name].shape)
    return result
