"""`expunge generate`: prompts → PNG files and a contact sheet."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.console import Out, Report
from expunge.cli.options import Device, Json, ModelOrRun, OutDir, Seed
from expunge.cli.places import Place, place
from expunge.core.errors import InputError

if TYPE_CHECKING:
    from expunge.core.generator import Generator

INDEX, SHEET, BATCH = "images.json", "sheet.png", 8


def generate(
    source: ModelOrRun,
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat for several.")],
    out: OutDir,
    count: Annotated[int, typer.Option("-n", min=1, help="Images per prompt, seeds S, S+1, …")] = 4,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="w in u + w (c - u).")] = 4.0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Draw images from a model, or from what `expunge erase` made of it.

    The same prompt and seed give the same image on both, up to what was erased.
    """
    screen, found = Out(machine=json), place(source)
    asked = [(text, seed + turn) for text in prompt for turn in range(count)]
    rows = [{"file": f"{n:04d}.png", "prompt": text, "seed": own} for n, (text, own) in enumerate(asked)]
    _check_free(out)
    with screen.waiting("loading the model"):
        model, origin = _opened(found, device)
    for text in prompt:
        model.check_prompt(text)
    rows = [{**row, "steps": steps, "guidance_scale": guidance, "from": source, **origin} for row in rows]
    _claim(out, rows)
    with screen.progress() as progress:
        _draw(model, rows, out, progress)
    _sheet(out, rows, columns=count)
    screen.emit({"out": str(out), "sheet": str(out / SHEET), "images": rows})
    screen.say(f"wrote {len(rows)} images and {out / SHEET}")


def _opened(found: Place, device: str) -> tuple["Generator", dict[str, Any]]:
    """Open a model, erased or not, and say by hashes which it is: a path may hold other weights tomorrow."""
    from expunge.models.load import load
    from expunge.stages import artifact
    from expunge.stages._provenance import model_fingerprint

    base = load(found.model, device=device, dtype=found.dtype)
    made = artifact.load(found.one) if found.one else None
    origin = {"base_sha256": model_fingerprint(base), "patch_sha256": made.card.patch.sha256 if made else None}
    return (made.on(base) if made else base), origin


def _check_free(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / INDEX).exists():
        raise InputError(f"{out} is not empty and holds no {INDEX}; choose another --out")


def _claim(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    from expunge.stages._files import read_json, write_json

    if not (out / INDEX).exists():
        write_json(out / INDEX, {"images": list(rows)})
    elif read_json(out / INDEX).get("images") != list(rows):
        raise InputError(f"{out} holds images of another request or of other weights; choose another --out")


def _draw(model: "Generator", rows: Sequence[dict[str, Any]], out: Path, progress: Report) -> None:
    import torch

    from expunge.stages._files import write_bytes
    from expunge.stages.sample import png

    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        if not all((out / row["file"]).exists() for row in part):
            with torch.no_grad():
                images = model.generate(
                    [row["prompt"] for row in part],
                    seeds=[row["seed"] for row in part],
                    guidance_scale=part[0]["guidance_scale"],
                    steps=part[0]["steps"],
                )
            for row, image in zip(part, images, strict=True):
                write_bytes(out / row["file"], png(image))
        progress("images", start + len(part), len(rows))


def _sheet(out: Path, rows: Sequence[dict[str, Any]], *, columns: int, gap: int = 4) -> None:
    """Lay the images out side by side, one row of seeds per prompt."""
    from PIL import Image

    from expunge.stages._files import write_bytes

    images = [Image.open(out / row["file"]) for row in rows]
    width, height = images[0].size
    lines = -(-len(images) // columns)
    size = (columns * (width + gap) + gap, lines * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    for n, image in enumerate(images):
        sheet.paste(image, (gap + n % columns * (width + gap), gap + n // columns * (height + gap)))
        image.close()
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    write_bytes(out / SHEET, stream.getvalue())
