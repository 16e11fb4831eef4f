"""Train `emoji-unet`, a latent diffusion U-Net in Stable Diffusion's format: python -m training.unet [--processes 2]

Loss = ||U(a_t z + s_t e, t, text) - (a_t e - s_t z)||^2, v-prediction on the zero-terminal-SNR schedule, t uniform;
one caption in ten is empty so that the unconditional prediction is learned. Autoencoder and text encoder stay
frozen.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from training import clip, latents, loop, options, release, text

HERE = Path(__file__).parent


def build() -> UNet2DConditionModel:
    """Two resolutions, 8×8 and 4×4, cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 256),
        layers_per_block=1,
        cross_attention_dim=clip.WIDTH,
        attention_head_dim=4,
        use_linear_projection=True,
    )


def schedule() -> DDIMScheduler:
    """Scaled-linear betas rescaled to zero terminal SNR; trailing steps, so that sampling starts from pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def objective(net: UNet2DConditionModel, args: argparse.Namespace) -> Callable[[int], Tensor]:
    """The loss of one step for this process's share of the batch."""
    embed, bars = text.Embedder(), schedule().alphas_cumprod
    share = args.batch // args.processes
    mixture = latents.Mixture(share, args.extra)

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step, loop.rank())
        z, captions = mixture.draw(random)
        # stratified: every batch sees all noise levels
        strata = torch.randperm(share, generator=random)
        t = ((torch.rand(share, generator=random) + strata) / share * 1000).long().clamp(max=999)
        a, s = bars[t].sqrt().view(-1, 1, 1, 1), (1 - bars[t]).sqrt().view(-1, 1, 1, 1)
        e, words = torch.randn(z.shape, generator=random), embed(captions)[0]
        with loop.mixed():
            v = net(a * z + s * e, t, words).sample
        return (v.float() - (a * e - s * z)).pow(2).mean()

    return loss


def assemble(weights: dict[str, Tensor]) -> StableDiffusionPipeline:
    """Join the trained U-Net with the frozen parts into a stock pipeline."""
    net = build()
    net.load_state_dict(weights)
    tokenizer, tower = text.clip_side()
    return StableDiffusionPipeline(
        vae=latents.finished(),
        text_encoder=tower,
        tokenizer=tokenizer,
        unet=net.eval(),
        scheduler=schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def work(rank: int, args: argparse.Namespace) -> None:
    """Train as one of `args.processes`, gradients averaged."""
    loop.join(rank, args.processes)
    torch.manual_seed(args.seed)
    net = build()
    if args.start:
        net.load_state_dict(load_file(release.EMBEDDED / args.start / "unet" / "diffusion_pytorch_model.safetensors"))
    trainer = loop.Trainer(net, args.run, options.recipe(args), lr=args.lr, decay=0.9985)
    for step in trainer.run(objective(net, args), save_every=250):
        if rank == 0 and step % args.publish == 0:
            release.publish(assemble(trainer.ema), args.run, "emoji-unet", "python -m training.unet")
    if rank == 0:
        # the learning rate has fallen to zero: an average would only look back at worse weights
        release.publish(assemble(net.state_dict()), args.run, "emoji-unet", "python -m training.unet")


def main() -> None:
    """Prepare the frozen parts, then train."""
    parser = options.parser(__doc__)
    parser.add_argument("--steps", type=options.count, default=4500)
    parser.add_argument("--first", type=options.natural, default=0, help="step of --start to count on from")
    parser.add_argument("--lr", type=options.rate, default=8e-4)
    parser.add_argument("--batch", type=options.count, default=128)
    parser.add_argument("--processes", type=options.count, default=2)
    parser.add_argument("--publish", type=options.count, default=500)
    parser.add_argument(
        "--start", choices=["emoji-unet"], help="published model to begin from where no checkpoint is left"
    )
    parser.add_argument(
        "--extra", type=options.share, default=0.0, help="share of other things (build_dataset --extra) in a batch"
    )
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--run", type=Path, default=HERE / "runs" / "unet")
    args = parser.parse_args()
    options.settle(parser, args)
    args.run.mkdir(parents=True, exist_ok=True)
    loop.quiet_cpu()
    latents.prepare()
    if args.processes == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
