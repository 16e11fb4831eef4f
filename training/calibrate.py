"""Calibrate all three judges of emoji world: python -m training.calibrate

The calibration split is every render on two backgrounds, twice, under augmentations no training image had:
once as it is, once as the embedded autoencoder gives it back, since that is how generated pictures look at best.
Writes calibration.json beside each judge's weights and prints accuracies; clusters are renders, not images.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from expunge.core.records import Estimate, OperatingPoint
from expunge.detectors._judge import JudgeNet
from expunge.detectors.clip_zero_shot import ClipZeroShot
from expunge.ops.stats import Sample, rate
from training import loop, world
from training.autoencoder import reconstruct
from training.judges import EMBEDDED, answers, uniform

ROUNDS, SEED = 2, 99
Asked = Callable[[Tensor], dict[str, Tensor]]  # images to logits per head
Truth = tuple[Tensor, Tensor, Tensor]  # what was said, what is right, which render


def unseen(images: Tensor, random: torch.Generator) -> Tensor:
    """Calibration augmentation, of kinds no training image had: wave, perspective, pixel grid, salt, gamma."""
    n = len(images)
    axis = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    phase = uniform(n, 0, 6.28, random).view(n, 1, 1)
    tilt = uniform(n, -0.12, 0.12, random).view(n, 1, 1)
    wave = 0.03 * torch.sin(6 * y + phase)
    grid = torch.stack([x / (1 + tilt * y) + wave, y / (1 + tilt * x)], -1)
    moved = grid_sample(images, grid, padding_mode="border", align_corners=False)
    coarse = interpolate(interpolate(moved, size=40, mode="area"), size=64, mode="nearest")
    moved = torch.where(uniform(n, 0, 1, random) < 0.3, coarse, moved)
    salt = torch.rand(n, 1, 64, 64, generator=random) < 0.02
    moved = torch.where(salt & (uniform(n, 0, 1, random) < 0.3), torch.ones(()), moved)
    return moved.clamp(0, 1) ** uniform(n, 0.8, 1.25, random)


def split(data: world.World, vae: AutoencoderKL) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Images, right classes and render numbers of the calibration split, batch by batch."""
    renders = torch.arange(len(data.rgba)).repeat_interleave(2)
    # neighbours in the file are other concepts, so every class meets every background
    pairs = torch.stack([renders, (torch.arange(len(renders)) * 3) % len(world.BACKGROUNDS)], 1)
    for number, chunk in enumerate(pairs.split(128)):
        index, background = chunk.T
        clean = data.compose(index, background)
        decoded = reconstruct(vae, clean)
        for turn in range(ROUNDS):
            images = unseen(decoded if turn % 2 else clean, loop.rng(SEED, number, turn))
            yield images, answers(data, index, background), index


def ask(logits_of: Asked, heads: list[str], data: world.World, vae: AutoencoderKL) -> dict[str, Truth]:
    """Top classes of one judge over the whole split, with the right ones."""
    found: dict[str, list[Truth]] = {head: [] for head in heads}
    for images, right, render in split(data, vae):
        logits = logits_of(images)
        for head in heads:
            found[head].append((logits[head].argmax(1), right[head], render))
    return {head: tuple(torch.cat(part) for part in zip(*rows, strict=True)) for head, rows in found.items()}


def clustered(hit: Tensor, render: Tensor) -> Estimate:
    """Rate of hits, resampling renders."""
    return rate(Sample.of(hit.tolist(), render.tolist()), seed=0)


def operating_points(truth: Truth, words: tuple[str, ...]) -> dict[str, OperatingPoint]:
    """Sensitivity and specificity of the decision "top-1 is this class"."""
    said, right, render = truth
    points = {}
    for k, word in enumerate(words):
        shown = right == k
        sensitivity = clustered(said[shown] == k, render[shown])
        specificity = clustered(said[~shown] != k, render[~shown])
        points[word] = OperatingPoint(threshold=0.0, sensitivity=sensitivity, specificity=specificity, n=len(said))
    return points


def calibrate(name: str, logits_of: Asked, labels: dict[str, tuple[str, ...]], vae: AutoencoderKL) -> None:
    """Ask one judge, write its calibration, print its accuracy."""
    truths = ask(logits_of, list(labels), world.load(), vae)
    table = {h: {w: asdict(p) for w, p in operating_points(truths[h], labels[h]).items()} for h in labels}
    (EMBEDDED / name / "calibration.json").write_text(json.dumps(table, indent=1) + "\n")
    for head, (said, right, render) in truths.items():
        e = clustered(said == right, render)
        print(
            f"{name:10} {head:10} {e.value:7.2%} [{e.low:7.2%}, {e.high:7.2%}] n={e.n} renders={e.clusters}", flush=True
        )


@torch.no_grad()
def main() -> None:
    """Calibrate the judges that are there."""
    loop.quiet_cpu()
    data = world.load()
    labels = {"concept": data.concepts, "style": data.styles, "background": tuple(world.BACKGROUNDS)}
    vae = AutoencoderKL.from_pretrained(EMBEDDED / "emoji-unet" / "vae", local_files_only=True).float().eval()
    for name in ("judge-cnn", "judge-vit"):
        calibrate(name, JudgeNet.from_folder(EMBEDDED / name), labels, vae)
    clip = {head: labels[head] for head in ("concept", "style")}
    # the zero-shot judge takes its list of classes from the calibration it is about to be given
    path = EMBEDDED / "emoji-clip" / "calibration.json"
    path.write_text(json.dumps({head: dict.fromkeys(words) for head, words in clip.items()}))
    calibrate("emoji-clip", ClipZeroShot().logits, clip, vae)


if __name__ == "__main__":
    main()
