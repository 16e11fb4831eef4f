"""Models, clock and account of the fine-tuning benchmark."""

import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from expunge.models._recompute import replayed
from expunge.models._tiny_text import tiny_tokenizer
from expunge.models.load import load
from expunge.models.unet import UNetGenerator

WINDOW = 77


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    ratio: float
    bar: str
    holds: bool
    n: int
    machine: str
    figures: dict[str, float]
    """Medians in seconds of processor time, or bytes, behind the ratio."""
    note: str = ""


def sd14(*, checkpointing: bool = False) -> UNetGenerator:
    """U-Net with Stable Diffusion 1.4's blocks, widths 320 and 640, heads, text width 768 and window 77.

    Less deep than the real one: two resolutions instead of four and one layer a block instead of two, 16 x 16 latents.
    Random weights; times and bytes do not depend on their values.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline warns about the absent safety checker
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(320, 640),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=8,
            cross_attention_dim=768,
        )
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            unet=unet,
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    if checkpointing:
        unet.enable_gradient_checkpointing(replayed)
    return UNetGenerator(pipeline, "sd14-shaped")


def emoji(*, checkpointing: bool = False) -> UNetGenerator:
    """The embedded model."""
    model = load("emoji-unet", checkpointing=checkpointing)
    assert isinstance(model, UNetGenerator)
    return model


MODELS: Mapping[str, Callable[..., UNetGenerator]] = {"emoji-unet": emoji, "SD1.4 shapes, reduced depth": sd14}


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )


def _tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = WINDOW
    return tokenizer


def _text_encoder() -> CLIPTextModel:
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=768,
            intermediate_size=768,
            num_hidden_layers=1,
            num_attention_heads=12,
            max_position_embeddings=WINDOW,
            bos_token_id=0,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


@dataclass
class Clock:
    """Processor time of a training's own steps, with other works timed between one step and the next.

    Processor time of this process alone: what other processes do to the wall clock does not count, and what they do to
    caches and clock rate meets all works alike, because they take turns.
    """

    others: Mapping[str, Callable[[], object]]
    warm: int
    spent: dict[str, list[float]] = field(default_factory=dict)
    walking: float = 0.0
    """Seconds of walking up front, by what the method itself reports of it."""
    steps: int = 0
    mark: float = field(default_factory=time.process_time)

    def progress(self, label: str, done: int, total: int) -> None:
        """Take what the method reports, after each of its steps, as the tick of the clock."""
        passed = time.process_time() - self.mark
        if label == "walking" and done:
            self.walking += passed
        if label == "fit":
            self.steps += 1
            if self.steps > self.warm:
                self.spent.setdefault("step", []).append(passed)
            for name, other in self.others.items():
                start = time.process_time()
                other()
                if self.steps > self.warm:
                    self.spent.setdefault(name, []).append(time.process_time() - start)
        self.mark = time.process_time()

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds of each work."""
        return {name: median(found) for name, found in self.spent.items()}


class Account(TorchDispatchMode):
    """Bytes of all tensors alive, each storage once; `peak` is the most since `restart`.

    Counts what operations hand out, in forward and backward passes and in optimizers; scratch space inside a kernel is
    not seen, on either side.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for network in networks:
            self.count([*network.parameters(), *network.buffers()])

    def restart(self) -> None:
        """Count the peak from here."""
        self.peak = self.now

    def count(self, tensors: Sequence[Tensor]) -> None:
        """Take tensors into the account unless they are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes()).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result


class Rows:
    """How many rows a network is asked about, with and without gradient; lives as long as the block."""

    def __init__(self, network: nn.Module) -> None:
        self.graded = self.plain = 0
        self._handle = network.register_forward_pre_hook(self._seen)

    def _seen(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self.graded += len(args[0])
        else:
            self.plain += len(args[0])

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *raised: object) -> None:
        self._handle.remove()
