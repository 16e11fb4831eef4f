"""What every latent generator learns from: the shared autoencoder, whitened, and latents of all renders, made once."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from training import autoencoder, build_dataset, loop, release, world

HERE = Path(__file__).parent
RUN = HERE / "runs" / "latents"
WORLD, EXTRA = RUN / "world.safetensors", RUN / "extra.safetensors"
PUBLISHED = release.EMBEDDED / "emoji-unet" / "vae"
EXTRA_BACKGROUNDS = 2
DROP = 0.1


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


def prepare() -> None:
    """Write autoencoder and latents below `RUN`: before training, and again for a newer autoencoder.

    Where no run of the autoencoder is left, the published one serves: it is whitened already.
    """
    RUN.mkdir(parents=True, exist_ok=True)
    trained = HERE / "runs" / "autoencoder" / "checkpoint.safetensors"
    if not newer(WORLD, trained if trained.exists() else PUBLISHED / "diffusion_pytorch_model.safetensors"):
        data = world.load()
        every = backgrounds_of(data, len(world.BACKGROUNDS))
        if trained.exists():
            vae = trained_autoencoder()
            whiten(vae, encode_all(vae, data, every)[data.train].flatten(0, 1))
            vae.half().save_pretrained(RUN / "vae")
        else:
            shutil.copytree(PUBLISHED, RUN / "vae", dirs_exist_ok=True)
        # latents of the weights that ship
        loop.save({"latents": encode_all(finished(), data, every)}, WORLD, {})
    if build_dataset.EXTRA.exists() and not newer(EXTRA, WORLD):
        vae = finished()
        others = world.load(build_dataset.EXTRA)
        loop.save({"latents": encode_all(vae, others, backgrounds_of(others, EXTRA_BACKGROUNDS))}, EXTRA, {})


def finished() -> AutoencoderKL:
    """Read the autoencoder that ships: whitened, rounded to half precision."""
    return AutoencoderKL.from_pretrained(RUN / "vae").float().eval()


class Pool:
    """Latents to learn from, with captions to them."""

    def __init__(self, data: world.World, file: Path) -> None:
        """Read what `prepare` wrote."""
        self.data = data
        self.latents = load_file(file)["latents"]
        self.backgrounds = backgrounds_of(data, self.latents.shape[1])
        self.drawn = [data.train[data.style[data.train] == s] for s in range(len(data.styles))]

    def draw(self, n: int, random: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents "n 16 8 8" and captions of n renders drawn with replacement, every style as often."""
        style = torch.randint(len(self.data.styles), (n,), generator=random)
        index = torch.stack(
            [self.drawn[s][int(torch.randint(len(self.drawn[s]), (), generator=random))] for s in style]
        )
        slot = torch.randint(self.latents.shape[1], (n,), generator=random)
        shown = self.backgrounds[index, slot].tolist()
        captions = [self.data.caption(i, b, random).text for i, b in zip(index.tolist(), shown, strict=True)]
        return self.latents[index, slot], captions


class Mixture:
    """Batches of emoji world with a share of other things."""

    def __init__(self, batch: int, extra: float) -> None:
        """Read the pools; `extra` is the other things' share."""
        more = round(batch * extra)
        self.pools = [(Pool(world.load(), WORLD), batch - more)]
        self.whole = self.pools[0][0].data
        """Emoji world, joined with the other things where they are drawn."""
        if more:
            others = world.load(build_dataset.EXTRA)
            self.whole = world.join(self.whole, others)
            self.pools.append((Pool(others, EXTRA), more))

    def draw(self, random: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents "b 16 8 8" and their captions, one in ten of them empty."""
        drawn = [pool.draw(n, random) for pool, n in self.pools]
        captions = [c for _, words in drawn for c in words]
        drop = torch.rand(len(captions), generator=random) < DROP
        return torch.cat([z for z, _ in drawn]), ["" if d else c for d, c in zip(drop.tolist(), captions, strict=True)]
