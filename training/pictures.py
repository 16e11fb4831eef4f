"""Draw what training left behind: python -m training.pictures [MODEL]

docs/img/loss.svg has the loss curves of every run's log; docs/img/MODEL.png has sixty samples, twelve concepts ×
five styles.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from expunge.models.load import load
from training import loop, world

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "img"
SHOWN = (
    "strawberry",
    "pizza",
    "dog",
    "penguin",
    "car",
    "rocket",
    "violin",
    "house",
    "umbrella",
    "rose",
    "ghost",
    "bomb",
)


def curves() -> None:
    """Plot loss against step for every run, log scale."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "expunge"
    from matplotlib import pyplot

    logs = sorted((HERE / "runs").glob("*/log.jsonl"))
    figure, axes = pyplot.subplots(1, len(logs), figsize=(3 * len(logs), 2.4), layout="constrained")
    for log, ax in zip(logs, axes, strict=True):
        rows = [row for row in map(json.loads, log.read_text().splitlines()) if "loss" in row or "begins" in row]
        # a stretch's line begins anew: its data, or its loss, may be others
        ax.plot([r["step"] for r in rows], [r.get("loss", np.nan) for r in rows], lw=1.2)
        ax.set(title=log.parent.name, xlabel="step", yscale="log")
    figure.savefig(OUT / "loss.svg", metadata={"Date": None})


def samples(name: str) -> None:
    """Draw the grid with one seed, 25 steps, guidance 4."""
    data, model, colours = world.load(), load(name), list(world.BACKGROUNDS)
    asked = [(s, c, colours[(i + j) % len(colours)]) for i, s in enumerate(data.styles) for j, c in enumerate(SHOWN)]
    prompts = [world.TEMPLATES[0].format(s=s, c=c, b=b) for s, c, b in asked]
    images = model.generate(prompts, seeds=[7] * len(prompts), guidance_scale=4.0, steps=25)
    grid = images.view(len(data.styles), len(SHOWN), 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(-1, len(SHOWN) * 64, 3)
    picture = Image.fromarray((grid.numpy() * 255).round().astype(np.uint8))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS).save(OUT / f"{name}.png")


def demo(run: Path) -> None:
    """Show a demo run's first four target cases and four neighbours: a row for the base model and one per method."""
    index = next(run.glob("samples/*/base/index.jsonl"))
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    shown = [[row for row in rows if row["role"] == role] for role in ("target", "retain")]
    files = [row["file"] for group in shown for row in group[:: max(1, len(group) // 4)][:4]]
    arms = ["base", *sorted(path.name for path in index.parents[1].iterdir() if path.name != "base")]
    picture = Image.new("RGB", (128 * len(files), 128 * len(arms)))
    for y, arm in enumerate(arms):
        for x, file in enumerate(files):
            image = Image.open(index.parents[1] / arm / file)
            picture.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (128 * x, 128 * y))
    picture.save(OUT / "demo.png")
    print("rows of demo.png:", ", ".join(arms))


def main() -> None:
    """Write all that can be drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="emoji-unet")
    parser.add_argument("--demo", type=Path, help="run folder of `expunge demo`, for docs/img/demo.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    loop.quiet_cpu()
    OUT.mkdir(parents=True, exist_ok=True)
    curves()
    samples(args.model)
    if args.demo:
        demo(args.demo)


if __name__ == "__main__":
    main()
