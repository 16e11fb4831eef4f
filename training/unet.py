"""Train `emoji-unet`, a latent diffusion U-Net in Stable Diffusion's format: python -m training.unet [--processes 2]

Loss = ||U(a_t z + s_t e, t, text) - (a_t e - s_t z)||^2, v-prediction on the zero-terminal-SNR schedule, t uniform;
one caption in ten is empty so that the unconditional prediction is learned. Autoencoder and text encoder stay
frozen.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from training import autoencoder, build_dataset, clip, loop, world

HERE = Path(__file__).parent
EMBEDDED = HERE.parent / "src" / "expunge" / "embedded"
DROP = 0.1
EXTRA_BACKGROUNDS = 2


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


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold x -> (x - mean) / std per channel into the 1×1 convolutions around the latent, so that scaling is 1."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


def trained_autoencoder() -> AutoencoderKL:
    """Read the finished autoencoder's average from its run."""
    vae = autoencoder.build()
    state = load_file(HERE / "runs" / "autoencoder" / "checkpoint.safetensors")
    vae.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("ema.")})
    return vae.eval()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: world.World, backgrounds: Tensor) -> Tensor:
    """Latents of every render on its backgrounds "n k": "n k 16 8 8"."""
    n, k = backgrounds.shape
    index = torch.arange(n).repeat_interleave(k)
    jobs = zip(index.split(64), backgrounds.flatten().split(64), strict=True)
    parts = [vae.encode(data.compose(i, b) * 2 - 1).latent_dist.mean for i, b in jobs]
    return torch.cat(parts).view(n, k, 16, 8, 8)


def backgrounds_of(data: world.World, k: int) -> Tensor:
    """Backgrounds of every render, "n k": all in order for k = 7, else k of them going round."""
    n, count = len(data.rgba), len(world.BACKGROUNDS)
    if k == count:
        return torch.arange(count).expand(n, count)
    return (torch.arange(n)[:, None] + 3 * torch.arange(k)) % count


def newer(made: Path, source: Path) -> bool:
    """Whether a file is there and not older than what it was made from."""
    return made.exists() and made.stat().st_mtime >= source.stat().st_mtime


def prepare(folder: Path) -> None:
    """Write the frozen parts, half precision, and the latents: before training, and again for a newer autoencoder."""
    made, extra = folder / "latents.safetensors", folder / "extra.safetensors"
    if not newer(made, HERE / "runs" / "autoencoder" / "checkpoint.safetensors"):
        data, vae = world.load(), trained_autoencoder()
        every = backgrounds_of(data, len(world.BACKGROUNDS))
        raw = encode_all(vae, data, every)
        whiten(vae, raw[data.train].flatten(0, 1))
        vae.half().save_pretrained(folder / "vae")
        # latents of the weights that ship
        loop.save({"latents": encode_all(vae.float(), data, every)}, made, 0)
    if build_dataset.EXTRA.exists() and not newer(extra, made):
        vae = AutoencoderKL.from_pretrained(folder / "vae").float().eval()
        others = world.load(build_dataset.EXTRA)
        loop.save({"latents": encode_all(vae, others, backgrounds_of(others, EXTRA_BACKGROUNDS))}, extra, 0)


class Pool:
    """Latents to learn from, with captions to them."""

    def __init__(self, data: world.World, file: Path) -> None:
        """Read what `prepare` wrote."""
        self.data = data
        self.latents = load_file(file)["latents"]
        self.backgrounds = backgrounds_of(data, self.latents.shape[1])

    def draw(self, n: int, random: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents "n 16 8 8" and captions of n renders drawn with replacement."""
        index = self.data.train[torch.randint(len(self.data.train), (n,), generator=random)]
        slot = torch.randint(self.latents.shape[1], (n,), generator=random)
        shown = self.backgrounds[index, slot].tolist()
        captions = [self.data.caption(i, b, random).text for i, b in zip(index.tolist(), shown, strict=True)]
        return self.latents[index, slot], captions


def text_side() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text tower of the in-domain CLIP, frozen."""
    run = HERE / "runs" / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    whole = CLIPModel.from_pretrained(run / "model").float()
    text = CLIPTextModel(whole.config.text_config)
    text.load_state_dict(whole.text_model.state_dict())
    return tokenizer, text.eval().requires_grad_(False)


class Embedder:
    """Caption to frozen token states, remembered."""

    def __init__(self) -> None:
        """Load tokenizer and tower."""
        self.tokenizer, self.text = text_side()
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        """Token states "b 32 d"."""
        new = [c for c in dict.fromkeys(captions) if c not in self.known]
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            self.known |= zip(new, self.text(ids).last_hidden_state.half(), strict=True)
        return torch.stack([self.known[c] for c in captions]).float()


def objective(net: UNet2DConditionModel, folder: Path, args: argparse.Namespace) -> Callable[[int], Tensor]:
    """The loss of one step for this process's share of the batch."""
    embed, bars = Embedder(), schedule().alphas_cumprod
    share = args.batch // args.processes
    more = round(share * args.extra)
    pools = [(Pool(world.load(), folder / "latents.safetensors"), share - more)]
    if more:
        pools.append((Pool(world.load(build_dataset.EXTRA), folder / "extra.safetensors"), more))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step, rank)
        drawn = [pool.draw(n, random) for pool, n in pools]
        z, captions = torch.cat([z for z, _ in drawn]), [c for _, captions in drawn for c in captions]
        drop = torch.rand(share, generator=random) < DROP
        words = embed(["" if d else c for d, c in zip(drop.tolist(), captions, strict=True)])
        # stratified: every batch sees all noise levels
        strata = torch.randperm(share, generator=random)
        t = ((torch.rand(share, generator=random) + strata) / share * 1000).long().clamp(max=999)
        a, s = bars[t].sqrt().view(-1, 1, 1, 1), (1 - bars[t]).sqrt().view(-1, 1, 1, 1)
        e = torch.randn(z.shape, generator=random)
        with torch.autocast("cpu", torch.bfloat16):
            v = net(a * z + s * e, t, words).sample
        return (v.float() - (a * e - s * z)).pow(2).mean()

    return loss


def assemble(weights: dict[str, Tensor], folder: Path) -> StableDiffusionPipeline:
    """Join the trained U-Net with the frozen parts into a stock pipeline."""
    net = build()
    net.load_state_dict(weights)
    tokenizer, text = text_side()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae").float(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net.eval(),
        scheduler=schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

A small text-to-image model of emoji world, made by `python -m training.unet` in the expunge repository.
Weights: Apache-2.0. It learned from open emoji art: Twemoji (CC-BY 4.0, Twitter, Inc and other contributors),
EmojiOne 2.3 (CC-BY 4.0), Fluent Emoji (MIT, Microsoft Corporation), Noto Emoji (Apache-2.0, Google LLC).
NOTICE in the repository has the full credits and says what was changed.
"""


def publish(weights: dict[str, Tensor], folder: Path, name: str) -> None:
    """Save the pipeline in half precision where the library finds it, whole or not at all."""
    target, scratch = EMBEDDED / name, folder / "published"
    shutil.rmtree(scratch, ignore_errors=True)
    assemble(weights, folder).to(torch.float16).save_pretrained(scratch, safe_serialization=True)
    # transformers opens a text encoder in the dtype its config names, diffusers the rest in float32: they must meet
    config = scratch / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    (scratch / "README.md").write_text(CARD.format(name=name))
    if target.exists():
        target.rename(folder / "replaced")
    scratch.rename(target)
    shutil.rmtree(folder / "replaced", ignore_errors=True)


def work(rank: int, args: argparse.Namespace) -> None:
    """Train as one of `args.processes`, gradients averaged."""
    loop.quiet_cpu()
    if args.processes > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29411")
        torch.distributed.init_process_group("gloo", rank=rank, world_size=args.processes)
        if hasattr(os, "sched_setaffinity"):
            # each step waits for the slowest: two processes on one core would halve the speed
            os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    torch.manual_seed(args.seed)
    net = build()
    if args.start:
        net.load_state_dict(load_file(EMBEDDED / args.start / "unet" / "diffusion_pytorch_model.safetensors"))
    trainer = loop.Trainer(net, args.run, lr=8e-4, steps=args.steps, decay=0.9985)
    if rank == 0:
        trainer.log(begins=True, steps=args.steps, batch=args.batch, extra=args.extra)
    for step in trainer.run(objective(net, args.run, args), save_every=250):
        if rank == 0 and step % args.publish == 0:
            publish(trainer.ema, args.run, "emoji-unet")
    if rank == 0:
        publish(trainer.ema, args.run, "emoji-unet")


def main() -> None:
    """Prepare the frozen parts, then train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--publish", type=int, default=500)
    parser.add_argument("--start", help="published model to begin from where no checkpoint is left, e.g. emoji-unet")
    parser.add_argument(
        "--extra", type=float, default=0.0, help="share of other things (build_dataset --extra) in a batch"
    )
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--run", type=Path, default=HERE / "runs" / "unet")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    loop.quiet_cpu()
    prepare(args.run)
    if args.processes == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
