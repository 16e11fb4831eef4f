"""Train the two image judges: python -m training.judges cnn|vit

They learn from real renders under strong augmentation, held-out pairs included: a judge must know every picture,
only the generator must not. Nothing here is ever seen by an eraser.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import (
    affine_grid,
    avg_pool2d,
    cross_entropy,
    grid_sample,
    interpolate,
)
from transformers import AutoModel, ResNetConfig, ViTConfig

from expunge.detectors._judge import JudgeNet
from training import loop, options, world

HERE = Path(__file__).parent
EMBEDDED = HERE.parent / "src" / "expunge" / "embedded"
HEADS = ("concept", "style", "background")


def backbone(kind: str) -> tuple[torch.nn.Module, int]:
    """Two architectures that share nothing: a basic-block ResNet and a vision transformer."""
    if kind == "cnn":
        widths = [32, 64, 128, 256]
        config = ResNetConfig(embedding_size=32, hidden_sizes=widths, depths=[1, 1, 1, 1], layer_type="basic")
        return AutoModel.from_config(config), widths[-1]
    config = ViTConfig(
        image_size=64, patch_size=8, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    return AutoModel.from_config(config, add_pooling_layer=False), 128


def uniform(n: int, low: float, high: float, random: torch.Generator) -> Tensor:
    """Draw "n" numbers, shaped to scale images."""
    return (low + (high - low) * torch.rand(n, generator=random)).view(n, 1, 1, 1)


def warp(images: Tensor, random: torch.Generator) -> Tensor:
    """Rotate up to 20 degrees, scale, shear and shift."""
    n = len(images)
    angle = uniform(n, -0.35, 0.35, random).flatten()
    scale, shear = uniform(n, 0.85, 1.3, random).flatten(), uniform(n, -0.15, 0.15, random).flatten()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * scale, -angle.sin() * scale + shear
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * scale, angle.cos() * scale
    theta[:, :, 2] = torch.rand(n, 2, generator=random) * 0.3 - 0.15
    grid = affine_grid(theta, list(images.shape), False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Training augmentation: warp, colour shift, blur, noise, an erased patch; each image draws its own strengths."""
    n = len(images)
    x = torch.where(uniform(n, 0, 1, random) < 0.8, warp(images, random), images)
    gain = 0.85 + 0.3 * torch.rand(n, 3, 1, 1, generator=random)
    x = (x - 0.5) * uniform(n, 0.8, 1.2, random) + 0.5 + uniform(n, -0.08, 0.08, random)
    x = x * torch.where(uniform(n, 0, 1, random) < 0.5, gain.clamp(0.92, 1.08), torch.ones(()))
    soft = interpolate(avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    x = torch.lerp(x, soft, uniform(n, -0.3, 1, random).clamp(min=0))
    x = x + torch.randn(x.shape, generator=random) * uniform(n, 0, 0.08, random)
    rows, corner = torch.arange(64), torch.randint(0, 56, (2, n, 1), generator=random)
    size = torch.randint(0, 14, (n, 1), generator=random)
    inside = [(rows >= c) & (rows < c + size) for c in corner]
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(hole, torch.rand(n, 3, 1, 1, generator=random), x).clamp(0, 1)


def colour_jitter(n: int, random: torch.Generator) -> Tensor:
    """Offsets added to whole pictures' background colours by compositing; small enough to stay nameable."""
    return (torch.rand(n, 3, 1, 1, generator=random) - 0.5) * 0.08


def answers(data: world.World, index: Tensor, background: Tensor) -> dict[str, Tensor]:
    """Right class per head."""
    return {"concept": data.concept[index], "style": data.style[index], "background": background}


def main() -> None:
    """Train one judge and save it in half precision; training.calibrate does the rest."""
    parser = options.parser(__doc__)
    parser.add_argument("kind", choices=["cnn", "vit"])
    parser.add_argument("--steps", type=options.count, help="default: 2500 for cnn, 4000 for vit")
    parser.add_argument("--batch", type=options.count, default=64)
    args = parser.parse_args()
    seed, steps = {"cnn": (11, 2500), "vit": (12, 4000)}[args.kind]
    args.steps, args.run = args.steps or steps, HERE / "runs" / f"judge-{args.kind}"
    options.settle(parser, args)
    loop.quiet_cpu()
    torch.manual_seed(seed)
    data = world.load()
    labels = dict(zip(HEADS, (data.concepts, data.styles, tuple(world.BACKGROUNDS)), strict=True))
    features, width = backbone(args.kind)
    net = JudgeNet(features, labels, width).to(memory_format=torch.channels_last)
    trainer = loop.Trainer(net, args.run, options.recipe(args), lr=1e-3)

    def loss(step: int) -> Tensor:
        random = loop.rng(seed, 1, step)
        index = torch.randint(len(data.rgba), (args.batch,), generator=random)
        background = torch.randint(len(world.BACKGROUNDS), (args.batch,), generator=random)
        images = (data.compose(index, background) + colour_jitter(args.batch, random)).clamp(0, 1)
        images = augment(images, random).to(memory_format=torch.channels_last)
        with loop.mixed():
            logits = net(images)
        truth = answers(data, index, background)
        return sum(cross_entropy(logits[h].float(), truth[h], label_smoothing=0.05) for h in HEADS)

    net.train()
    for _ in trainer.run(loss):
        pass
    folder = EMBEDDED / f"judge-{args.kind}"
    folder.mkdir(parents=True, exist_ok=True)
    features.config.save_pretrained(folder)
    (folder / "judge.json").write_text(json.dumps({"labels": labels, "width": width}, indent=1) + "\n")
    weights = {k: v.half() if v.dtype == torch.float32 else v for k, v in trainer.ema.items()}
    loop.save(weights, folder / "model.safetensors", {"step": trainer.step})


if __name__ == "__main__":
    main()
