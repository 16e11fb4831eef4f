"""Stable Diffusion 3/3.5 and FLUX.1, and folders in their format: transformers over text and image tokens together."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jaxtyping import Bool, Float
from torch import Tensor

from expunge.core.condition import GUIDANCE, Condition
from expunge.core.errors import InputError
from expunge.core.generator import EditSite, Group
from expunge.models._base import check_group, linear_site
from expunge.models._flow import Flow
from expunge.models._mmdit_groups import GROUPS, Transformer, mmdit_paths, site_roles

_PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
_LONG, _SHORT = 512, 256  # T5 windows: FLUX.1-dev; FLUX.1-schnell and SD3, as their pipelines and cards have it


class MMDiTGenerator(Flow):
    """A stock FluxPipeline or StableDiffusion3Pipeline seen through the verbs erasers need.

    FLUX: tokens are T5's states, `pooled` is CLIP's. Latents are "b c h w" here; packing them 2 × 2 is the adapter's
    own business. SD3: tokens are both CLIPs' rows side by side, padded to T5's width, then T5's rows; `Condition.bands`
    tells them apart. Without its T5 those are zeros, as the pipeline has it. `pooled` is both CLIPs'. Text enters by
    two routes, tokens and pooled, and `sites` names a layer for each. Guidance is read as `Flow` says.
    Raises InputError for variants this adapter would misread: other samplers, image-conditioned transformers.
    """

    def __init__(self, pipeline: FluxPipeline | StableDiffusion3Pipeline, name: str) -> None:
        check_pipeline(pipeline, name)
        parts = {part: getattr(pipeline, part) for part in _PARTS if getattr(pipeline, part, None) is not None}
        super().__init__(name, "mmdit", parts)
        self.pipeline = pipeline
        self.scheduler = pipeline.scheduler
        self.flux = isinstance(pipeline.transformer, FluxTransformer2DModel)
        self.distilled = self.flux and bool(pipeline.transformer.config.guidance_embeds)
        self.latent = _latent(pipeline)
        patch = 2 if self.flux else pipeline.transformer.config.patch_size
        self.tokens_per_image = (self.latent[1] // patch) * (self.latent[2] // patch)

    @property
    def transformer(self) -> Transformer:
        """The base denoiser, as it was loaded."""
        return cast(Transformer, self.network["transformer"])

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, padding included; too long ones are cut as the pipelines do (`check_prompt` tells).

        A distilled model is asked for guidance 1 (see `Flow`).
        """
        if not prompts:
            raise InputError("no prompts to encode")
        if self.texts is not None:
            return self.texts.encode(prompts, self.name)
        tokens, mask, pooled, first = self._read_flux(prompts) if self.flux else self._read_sd3(prompts)
        return Condition(
            tokens=tokens,
            mask=mask,
            last=(mask[:, :first].sum(1) - 2).clamp(min=0),
            pooled=pooled,
            extra={GUIDANCE: torch.ones(len(prompts), device=self.device)} if self.distilled else {},
            bands=() if first == mask.shape[1] else ((0, first), (first, mask.shape[1])),
        )

    def check_prompt(self, text: str) -> None:
        """Raise InputError if a phrase yields no tokens, unknown tokens, or does not fit the window.

        The window is that of the longest encoder: T5's, or CLIP's in an SD3 without T5. CLIP sees the beginning only
        of what is longer than its own, as in the pipelines.
        """
        room = 0
        for suffix in self._suffixes():
            tokenizer = getattr(self.pipeline, f"tokenizer{suffix}")
            marks = len(tokenizer("").input_ids)  # CLIP: before and after; T5: after
            ids = tokenizer(text, truncation=False, verbose=False).input_ids[marks - 1 : -1]
            if not ids:
                raise InputError(f"prompt {text!r} has no words the tokenizers of {self.name!r} can see")
            if tokenizer.unk_token_id in ids:
                raise InputError(f"prompt {text!r} holds signs the tokenizers of {self.name!r} do not know")
            room = max(room, self._window(suffix) - marks)
        if len(ids) > room:
            raise InputError(f"prompt {text[:60]!r} has {len(ids)} tokens; {self.name!r} reads at most {room}")

    def predict_at(self, x: Float[Tensor, "b c h w"], timestep: Tensor, cond: Condition) -> Float[Tensor, "b c h w"]:
        """Run the transformer; inputs are cast to its dtype, which is the dtype of the velocity."""
        dtype = next(iter(self._base.values())).dtype
        tokens, pooled = cond.tokens.to(dtype), cast(Tensor, cond.pooled).to(dtype)
        time, named = timestep.expand(x.shape[0]), {"return_dict": False}
        if not self.flux:
            return self.call("transformer", (x.to(dtype), tokens, pooled, time), named)[0]
        text_ids, image_ids = self._positions(tokens.shape[1], dtype)
        scale = cond.extra[GUIDANCE] if self.distilled else None
        inputs = (pack(x.to(dtype)), tokens, pooled, time.to(dtype) / 1000, image_ids, text_ids, scale)
        return unpack(self.call("transformer", inputs, named)[0], *self.latent[1:])

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance_scale: float,
        steps: int,
        negative: Sequence[str] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Draw one image in [0, 1] per prompt and seed with the model's own sampler, as the stock pipeline does.

        guidance_scale is FLUX's `true_cfg_scale` and SD3's `guidance_scale`; in a distilled FLUX it is the embedded
        `guidance_scale`, and negative prompts are refused there: nothing could read them. Raises InputError for lengths
        that disagree.
        """
        if negative is not None and self.distilled:
            raise InputError(f"{self.name!r} is guidance-distilled and has no unconditional pass for a negative prompt")
        return super().generate(prompts, seeds=seeds, guidance_scale=guidance_scale, steps=steps, negative=negative)

    def sites(self, group: Group) -> list[EditSite]:
        """List the linear maps in a group that read the prompt, in the network's order.

        text_in: `context_embedder` (reads tokens) and the pooled text's first layer (reads pooled); their input is a
        function of the prompt alone. cross_kv and groups that contain it: the text stream's `add_k_proj` and
        `add_v_proj` too, whose input also depends on t, and on the image from the second block on: a closed form
        there is an approximation.
        """
        inside = set(self.select(group))
        return [linear_site(self, path, *found) for path, found in site_roles(self.transformer) if path in inside]

    def absorb(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Encode images in [0, 1] to scaled latents: the mode of the autoencoder's posterior, no sampling."""
        vae = self.pipeline.vae
        moments = self.call("vae.encoder", ((2 * images - 1).to(vae.dtype),))
        if vae.quant_conv is not None:
            moments = self.call("vae.quant_conv", (moments,))
        return (moments.chunk(2, dim=1)[0] - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Decode scaled latents to float32 images in [0, 1]."""
        vae = self.pipeline.vae
        z = x.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        if vae.post_quant_conv is not None:
            z = self.call("vae.post_quant_conv", (z,))
        return (self.call("vae.decoder", (z,)) * 0.5 + 0.5).clamp(0, 1).float()

    def _paths(self, group: Group) -> list[str]:
        check_group(group, GROUPS)
        if group == "text_encoder":
            return [path for path in self._base if path.startswith("text_encoder")]
        return mmdit_paths(self.transformer, group)

    def _shift_limits(self) -> dict[str, float]:
        return {"base_shift": 0.5, "max_shift": 1.15 if self.flux else 1.16}  # the two pipelines' own defaults

    def _grid(self, steps: int) -> dict[str, Any]:
        if not self.flux:
            return super()._grid(steps)
        width = (1 / steps - 1) / max(steps - 1, 1)
        return {"sigmas": [1.0 + index * width for index in range(steps - 1)] + [1 / steps]}  # FluxPipeline's own grid

    def _read_flux(self, prompts: Sequence[str]) -> tuple[Tensor, Bool[Tensor, "b l"], Tensor, int]:
        ids, _ = self._tokenize(prompts, "")
        pooled = self.call("text_encoder", (ids,), {"output_hidden_states": False}).pooler_output
        ids, mask = self._tokenize(prompts, "_2")
        return self.call("text_encoder_2", (ids,), {"output_hidden_states": False})[0], mask, pooled, mask.shape[1]

    def _read_sd3(self, prompts: Sequence[str]) -> tuple[Tensor, Bool[Tensor, "b l"], Tensor, int]:
        """Rows of both CLIPs, then of T5, with the mask, the pooled text and the number of CLIP's rows."""
        ids, mask = self._tokenize(prompts, "")
        seen = [self.call("text_encoder", (ids,), {"output_hidden_states": True})]
        ids, _ = self._tokenize(prompts, "_2")
        seen.append(self.call("text_encoder_2", (ids,), {"output_hidden_states": True}))
        clip = torch.cat([out.hidden_states[-2] for out in seen], dim=-1)
        width = self.transformer.config.joint_attention_dim
        if "text_encoder_3" in self.network:
            ids, more = self._tokenize(prompts, "_3")
            t5 = self.call("text_encoder_3", (ids,))[0]
        else:
            more = mask.new_zeros(len(prompts), _SHORT)
            t5 = clip.new_zeros(len(prompts), _SHORT, width)
        rows = torch.cat([torch.nn.functional.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        return rows, torch.cat([mask, more], dim=1), torch.cat([out[0] for out in seen], dim=-1), mask.shape[1]

    def _tokenize(self, prompts: Sequence[str], suffix: str) -> tuple[Tensor, Bool[Tensor, "b l"]]:
        batch = getattr(self.pipeline, f"tokenizer{suffix}")(
            list(prompts),
            padding="max_length",
            max_length=self._window(suffix),
            truncation=True,
            return_tensors="pt",
        )
        return batch.input_ids.to(self.device), batch.attention_mask.to(self.device).bool()

    def _suffixes(self) -> tuple[str, ...]:
        """Tokenizers in use, T5's last."""
        return tuple(part.removeprefix("text_encoder") for part in self.network if part.startswith("text_encoder"))

    def _window(self, suffix: str) -> int:
        longest = int(getattr(self.pipeline, f"tokenizer{suffix}").model_max_length)
        config = self.network[f"text_encoder{suffix}"].config
        if config.model_type.startswith("clip"):
            return min(longest, config.max_position_embeddings)
        return min(longest, _LONG if self.distilled else _SHORT)

    def _positions(self, length: int, dtype: torch.dtype) -> tuple[Float[Tensor, "l 3"], Float[Tensor, "n 3"]]:
        """Rotary coordinates of FLUX: text at the origin, image patches at (0, row, column)."""
        height, width = (side // 2 for side in self.latent[1:])
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(height).float(), torch.arange(width).float())
        return torch.zeros(length, 3, device=self.device, dtype=dtype), grid.to(self.device, dtype)


def pack(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """Lay 2 × 2 patches out as tokens, row by row: n = h w / 4, d = 4 c."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Float[Tensor, "b n d"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """Undo `pack`."""
    b, _, d = tokens.shape
    patches = tokens.view(b, height // 2, width // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, d // 4, height, width)


def check_pipeline(pipeline: FluxPipeline | StableDiffusion3Pipeline, name: str) -> None:
    """Raise InputError for what would load, but be misread by this adapter."""
    if not isinstance(pipeline.transformer, FluxTransformer2DModel | SD3Transformer2DModel):
        kind = type(pipeline.transformer).__name__
        raise InputError(f"transformer of {name!r} is a {kind}; legal: FluxTransformer2DModel, SD3Transformer2DModel")
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        kind = type(pipeline.scheduler).__name__
        raise InputError(f"model {name!r} samples by {kind}; legal: FlowMatchEulerDiscreteScheduler")
    if pipeline.scheduler.config.invert_sigmas:
        raise InputError(f"scheduler of {name!r} counts noise backwards (invert_sigmas), which cannot be read")
    reads, makes = pipeline.transformer.config.in_channels, pipeline.vae.config.latent_channels
    if reads != makes * (4 if isinstance(pipeline.transformer, FluxTransformer2DModel) else 1):
        raise InputError(
            f"transformer of {name!r} reads {reads} channels, its autoencoder makes {makes}: an inpainting or "
            "image-conditioned model, not text-to-image"
        )


def _latent(pipeline: FluxPipeline | StableDiffusion3Pipeline) -> tuple[int, int, int]:
    """Channels, height and width: SD3's transformer states its size, FLUX leaves it to the autoencoder."""
    config, vae = pipeline.transformer.config, pipeline.vae.config
    if isinstance(pipeline.transformer, SD3Transformer2DModel):
        return config.in_channels, config.sample_size, config.sample_size
    side = vae.sample_size // pipeline.vae_scale_factor // 2 * 2
    return vae.latent_channels, side, side
