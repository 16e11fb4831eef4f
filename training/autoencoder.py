"""Train the autoencoder that every embedded family shares: python -m training.autoencoder

Stock AutoencoderKL, 64×64×3 → 8×8×16. Loss = L1 + L1 of horizontal and vertical differences + 1e-6 KL.
With --decoder-only the averaged encoder stays as it is, so that latents, and generators trained on them, keep their
meaning while the decoder learns on.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training import loop, options, world

RUNS = Path(__file__).parent / "runs"


def build() -> AutoencoderKL:
    """Slim at full resolution: convolutions there cost the most on a CPU."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return float(-10 * torch.log10((a - b).pow(2).mean((1, 2, 3))).mean())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode to the mean, decode, clamp: images in [0, 1]."""
    return (vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)


def freeze_encoder(net: AutoencoderKL, averaged: dict[str, Tensor]) -> None:
    """Give the encoder its averaged weights and hold it there."""
    kept = ("encoder.", "quant_conv.")
    net.load_state_dict({k: averaged[k] if k.startswith(kept) else v for k, v in net.state_dict().items()})
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(kept))


def main() -> None:
    """Train, log, and save the averaged weights."""
    parser = options.parser(__doc__)
    parser.add_argument("--steps", type=options.count, default=3500)
    parser.add_argument("--batch", type=options.count, default=16)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=RUNS / "autoencoder")
    args = parser.parse_args()
    options.settle(parser, args)
    loop.quiet_cpu()
    torch.manual_seed(args.seed)
    data = world.load()
    net = build().to(memory_format=torch.channels_last)
    trainer = loop.Trainer(net, args.run, options.recipe(args), lr=1e-3, decay=0.998)
    if args.decoder_only:
        freeze_encoder(net, trainer.ema)

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step)
        index = data.train[torch.randint(len(data.train), (args.batch,), generator=random)]
        background = torch.randint(len(world.BACKGROUNDS), (args.batch,), generator=random)
        x = (data.compose(index, background) * 2 - 1).to(memory_format=torch.channels_last)
        with loop.mixed():
            with torch.set_grad_enabled(not args.decoder_only):
                posterior = net.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            noise = torch.randn(mean.shape, generator=random)
            y = net.decode(mean + std * noise).sample.float()
        kl = 0.5 * (mean.pow(2) + std.pow(2) - 1 - 2 * posterior.logvar.float() * 0.5).mean()
        detail = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        return (x - y).abs().mean() + detail + 1e-6 * kl

    probe = data.compose(data.train[::13], torch.arange(len(data.train[::13])) % len(world.BACKGROUNDS))
    for step in trainer.run(loss):
        if step % 500 == 0:
            averaged = build()
            averaged.load_state_dict(trainer.ema)
            trainer.log(psnr=psnr(reconstruct(averaged, probe), probe))


if __name__ == "__main__":
    main()
