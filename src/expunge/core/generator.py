"""What a generator is: a few verbs that denoisers and token models share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.condition import Condition

Family = Literal["unet", "mmdit", "autoregressive"]

Group = Literal["text_in", "cross_kv", "cross_attention", "non_cross_attention", "attention", "all", "text_encoder"]
"""Parameter groups. U-Net: `text_in` = `cross_kv` = attn2.to_k/to_v; `cross_attention` = all of attn2 (ESD-x);
`non_cross_attention` = all but attn2, the timestep embedding and the output layers (ESD-u); `attention` = attn1 and
attn2; `all` = the whole denoiser.

MMDiT: `text_in` = the context embedder and the pooled text's first layer; `cross_kv` = add_k_proj/add_v_proj;
`cross_attention` = every attention that reads text, both its streams; `attention` = also the image's attention to
itself; `non_cross_attention` = all but the first, the embeddings of text and time and the output layers."""


@dataclass(frozen=True)
class State:
    """A point on a model's own trajectory."""

    x: Tensor
    """Latents "b c h w", or token ids "b n"."""
    t: Float[Tensor, "b"] | None = None
    """Noise level in [0, 1], 1 = noise; None for token models."""


@dataclass(frozen=True)
class EditSite:
    """A linear map that reads the prompt."""

    path: str
    """Rooted at the component, as diffusers names it: "unet.….attn2.to_k.weight"."""
    weight: Float[Tensor, "out in"]
    """As the view sees it."""
    role: Literal["key", "value", "context", "pooled"]
    reads: Literal["tokens", "pooled"]
    rows: tuple[int, int]
    """Band [first, end) of a fused matrix; (0, out) otherwise."""


@dataclass(frozen=True)
class Hook:
    """A forward hook that lives as long as a view's call.

    `run(module, inputs, output)` returns the replacement output, or None to keep it.
    """

    path: str
    """Module path below `network`."""
    run: Callable[[nn.Module, tuple[Any, ...], Any], Any]


@runtime_checkable
class Guard(Protocol):
    """An intervention at inference time: three points at which a sampler asks it."""

    def condition(self, cond: Condition) -> Condition:
        """Replace the encoded prompt before sampling starts."""
        ...

    def combine(
        self,
        model: "Generator",
        state: State,
        cond: Float[Tensor, "b ..."],
        uncond: Float[Tensor, "b ..."],
        scale: float,
    ) -> Float[Tensor, "b ..."]:
        """Combine two predictions into the guided one; without intervention uncond + scale * (cond - uncond)."""
        ...

    def image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Replace finished images, values in [0, 1]."""
        ...


@runtime_checkable
class Generator(Protocol):
    """A text-to-image model seen through the verbs erasers need.

    `network` holds every component under its diffusers name, so `network.get_parameter("unet.….weight")` is the base
    tensor of a path. Nothing here changes it: `view` returns another generator on the same network.
    """

    name: str
    family: Family

    @property
    def network(self) -> nn.Module:
        """Every component under its diffusers name, as loaded; never written to."""
        ...

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, padding included; differentiable in the text encoder's weights."""
        ...

    def check_prompt(self, text: str) -> None:
        """Raise InputError if a phrase yields no tokens, unknown tokens, or does not fit the window."""
        ...

    def visit(self, cond: Condition, *, rng: torch.Generator, guidance_scale: float, steps: int = 50) -> State:
        """Walk the model's own guided sampler from noise, each sample to its own uniformly drawn grid point.

        `x` has exactly the noise level of the `t` returned. On a student's view it is the student's trajectory.
        """
        ...

    def predict(self, state: State, cond: Condition) -> Float[Tensor, "b ..."]:
        """Give the native prediction (eps, v, flow or logits) at a state under a prompt."""
        ...

    def distance(self, pred: Float[Tensor, "b ..."], goal: Float[Tensor, "b ..."]) -> Float[Tensor, "b"]:
        """Say how far two native predictions are apart: mean squared error, or KL for token models."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance_scale: float,
        steps: int,
        negative: Sequence[str] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Draw images in [0, 1], one seed each, independent of how they are batched."""
        ...

    def sites(self, group: Group) -> list[EditSite]:
        """List the linear maps of a group that read the prompt; empty if the family has none."""
        ...

    def select(self, group: Group) -> dict[str, Tensor]:
        """Give the tensors of a parameter group by path, as this view sees them."""
        ...

    def weight(self, path: str) -> Tensor:
        """Give one tensor by path, as this view sees it; an unknown path raises InputError."""
        ...

    def view(
        self,
        *,
        weights: Mapping[str, Tensor] = ...,
        guards: Sequence[Guard] = ...,
        hooks: Sequence[Hook] = ...,
    ) -> "Generator":
        """Give a generator on the same network with replaced weights, added guards and added hooks; views stack."""
        ...

    def absorb(self, images: Float[Tensor, "b 3 h w"]) -> Tensor:
        """Turn images in [0, 1] into what the denoiser works on: latents or token ids."""
        ...

    def noised(self, clean: Tensor, *, rng: torch.Generator) -> State:
        """Noise clean latents to a uniformly drawn level of the training schedule."""
        ...

    def as_eps(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert a native prediction to noise, for anything nonlinear in it; denoisers only."""
        ...

    def as_clean(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert a native prediction to the clean sample it implies; denoisers only."""
        ...
