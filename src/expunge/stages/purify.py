"""Purify: take a concept out of a real picture, through the noise and back."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.models._denoiser import Denoiser
from expunge.models.load import load as load_model
from expunge.ops.purify import descended, inverted
from expunge.ops.rows import at_scales
from expunge.stages import _files, artifact
from expunge.stages.sample import png

BEFORE, AFTER = "before.png", "after.png"


def purify(
    source: Path, picture: Path, prompt: str, out: Path, run: Run, *, guidance_scale: float, steps: int, depth: float
) -> tuple[Path, Path]:
    """Walk a picture up to a noise level by the base model under "", and down by the erased one under `prompt`.

    Writes before.png, the same walk down by the base model, and after.png into `out`; gives both. The picture is scaled
    to the model's size. Raises InputError for a file that is no picture and for an artifact that is a guard: the walk
    goes by predictions, which no guard changes.
    """
    image, made = _read(picture), artifact.load(source)
    if made.card.patch.kind == "guard":
        raise InputError(f"{source} is a guard ({made.card.method}), which changes no prediction: nothing to purify by")
    run.progress(f"load {made.card.base.name}", 0, 1)
    base = load_model(made.card.base.name, device=run.device, dtype=made.card.run.dtype)
    run.progress(f"load {made.card.base.name}", 1, 1)
    base.check_prompt(prompt)
    clean = base.absorb(_fitted(image, base).to(base.device))
    noisy = inverted(base, clean, at_scales(base.encode([""]), (1.0,)), steps, depth)
    files = (out / BEFORE, out / AFTER)
    out.mkdir(parents=True, exist_ok=True)
    for done, (file, model) in enumerate(zip(files, (base, made.on(base)), strict=True)):
        run.progress("walks", done, len(files))
        cond, uncond = at_scales(model.encode([prompt]), (guidance_scale,)), model.encode([""])
        scale = 1.0 if getattr(base, "distilled", False) else guidance_scale
        found = descended(model, noisy, cond, uncond, guidance_scale=scale, steps=steps, depth=depth)
        _files.write_bytes(file, png(base.decode(found)[0]))
    run.progress("walks", len(files), len(files))
    return files


def _read(picture: Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(_files.read_bytes(picture))) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{picture} is not a picture that can be read; legal: PNG, JPEG, WebP and the like") from None


def _fitted(image: Image.Image, model: Denoiser) -> Float[Tensor, "1 3 h w"]:
    with torch.no_grad():
        height, width = model.decode(torch.zeros(1, *model.latent, device=model.device)).shape[2:]
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
