"""Stable Diffusion 1.x, 2.x and SDXL, and folders in their format: a U-Net with cross-attention on text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import EditSite, Group
from expunge.models._base import check_group, linear_site
from expunge.models._diffusion import PREDICTIONS, SAMPLERS, Diffusion

GROUPS: tuple[Group, ...] = (
    "text_in",
    "cross_kv",
    "cross_attention",
    "non_cross_attention",
    "attention",
    "all",
    "text_encoder",
)

_PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
_OUTSIDE_ESD_U = ("conv_norm_out", "conv_out", "time_embedding", "add_embedding")


class UNetGenerator(Diffusion):
    """A stock StableDiffusionPipeline or StableDiffusionXLPipeline seen through the verbs erasers need.

    Prediction type, time grid and scaling are the pipeline's own. SDXL: tokens are the two encoders' penultimate
    states side by side ("b l 768+1280"), `pooled` is the second encoder's projection, `extra["time_ids"]` the size and
    crop numbers of an uncropped image; the empty prompt is zeros where the pipeline says so
    (`force_zeros_for_empty_prompt`), as its unconditional branch is. Raises InputError for variants this adapter would
    misread: other prediction types, inpainting inputs, guidance-distilled or class-conditioned U-Nets.
    """

    def __init__(self, pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, name: str) -> None:
        check_pipeline(pipeline, name)
        parts = {part: getattr(pipeline, part) for part in _PARTS if getattr(pipeline, part, None) is not None}
        super().__init__(name, "unet", parts)
        self.pipeline = pipeline
        self.scheduler = pipeline.scheduler
        self.sdxl = isinstance(pipeline, StableDiffusionXLPipeline)
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent = (pipeline.unet.config.in_channels, height, width)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The base denoiser, as it was loaded."""
        return cast(UNet2DConditionModel, self.network["unet"])

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, padding included; too long ones are cut as the pipeline does (`check_prompt` tells)."""
        if not prompts:
            raise InputError("no prompts to encode")
        if self.texts is not None:
            return self.texts.encode(prompts, self.name)
        ids, mask = self._tokenize(prompts, "")
        states, pooled = self._read(ids, mask, "")
        if self.sdxl:
            more, pooled = self._read(*self._tokenize(prompts, "_2"), "_2")
            states = torch.cat([states, more], dim=-1)
        cond = Condition(
            tokens=states,
            mask=mask.bool(),
            last=(mask.sum(1) - 2).clamp(min=0),
            pooled=pooled if self.sdxl else None,
            extra={"time_ids": self._time_ids(len(prompts), states.dtype)} if self.sdxl else {},
        )
        return self._zeroed(cond, prompts)

    def check_prompt(self, text: str) -> None:
        """Raise InputError if a phrase yields no tokens, unknown tokens, or does not fit the window."""
        for suffix in ("", "_2") if self.sdxl else ("",):
            tokenizer = getattr(self.pipeline, f"tokenizer{suffix}")
            ids = tokenizer(text, truncation=False, verbose=False).input_ids[1:-1]
            room = self._window(suffix) - 2
            if not ids:
                raise InputError(f"prompt {text!r} has no words the tokenizer of {self.name!r} can see")
            if tokenizer.unk_token_id in ids:
                raise InputError(f"prompt {text!r} holds signs the tokenizer of {self.name!r} does not know")
            if len(ids) > room:
                raise InputError(f"prompt {text[:60]!r} has {len(ids)} tokens; {self.name!r} reads at most {room}")

    def predict_at(self, x: Float[Tensor, "b c h w"], timestep: Tensor, cond: Condition) -> Float[Tensor, "b c h w"]:
        """Run the U-Net; inputs are cast to its dtype, which is the dtype of the prediction."""
        dtype = self._base["unet.conv_in.weight"].dtype
        added = None
        if self.sdxl and cond.pooled is not None:
            added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.extra["time_ids"].to(dtype)}
        named = {"added_cond_kwargs": added, "return_dict": False}
        return self.call("unet", (x.to(dtype), timestep, cond.tokens.to(dtype)), named)[0]

    def sites(self, group: Group) -> list[EditSite]:
        """List the cross-attention key and value matrices in a group, in the network's order.

        Their input is a function of the prompt alone: 32 in SD 1.x, 140 in SDXL. SDXL's pooled text enters through
        `add_embedding`, fused with sizes and crops; no closed form here edits it.
        """
        inside = set(self.select(group))
        found = []
        for prefix in _attention_prefixes(self.unet, cross=True):
            for layer, role in (("to_k", "key"), ("to_v", "value")):
                if (path := f"{prefix}{layer}.weight") in inside:
                    found.append(linear_site(self, path, role, "tokens"))
        return found

    def absorb(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Encode images in [0, 1] to scaled latents: the mode of the autoencoder's posterior, no sampling."""
        vae = self.pipeline.vae
        wide = self._vae_dtype()
        moments = self.call("vae.encoder", ((2 * images - 1).to(wide),), dtype=wide)
        if vae.quant_conv is not None:
            moments = self.call("vae.quant_conv", (moments,), dtype=wide)
        z = moments.chunk(2, dim=1)[0].to(vae.dtype)
        spread = self._latent_spread(z)
        return (
            z * vae.config.scaling_factor if spread is None else (z - spread[0]) * vae.config.scaling_factor / spread[1]
        )

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Decode scaled latents to float32 images in [0, 1], computed in float32 where the autoencoder asks for it."""
        vae = self.pipeline.vae
        wide = self._vae_dtype()
        z, spread = x.to(wide), self._latent_spread(x.to(wide))
        factor = vae.config.scaling_factor
        z = z / factor if spread is None else z * spread[1] / factor + spread[0]
        if vae.post_quant_conv is not None:
            z = self.call("vae.post_quant_conv", (z,), dtype=wide)
        return (self.call("vae.decoder", (z,), dtype=wide) * 0.5 + 0.5).clamp(0, 1).float()

    def _paths(self, group: Group) -> list[str]:
        check_group(group, GROUPS)
        if group == "text_encoder":
            return [path for path in self._base if path.startswith("text_encoder")]
        return unet_paths(self.unet, group)

    def _tokenize(self, prompts: Sequence[str], suffix: Literal["", "_2"]) -> tuple[Tensor, Tensor]:
        tokenizer = getattr(self.pipeline, f"tokenizer{suffix}")
        batch = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self._window(suffix),
            truncation=True,
            return_tensors="pt",
        )
        return batch.input_ids.to(self.device), batch.attention_mask.to(self.device)

    def _read(self, ids: Tensor, mask: Tensor, suffix: Literal["", "_2"]) -> tuple[Tensor, Tensor]:
        """Token states and first output of one text encoder, as its pipeline uses them."""
        part = f"text_encoder{suffix}"
        masked = getattr(self.network[part].config, "use_attention_mask", False) and not self.sdxl
        out = self.call(part, (ids,), {"attention_mask": mask if masked else None, "output_hidden_states": self.sdxl})
        return (out.hidden_states[-2] if self.sdxl else out[0]), out[0]

    def _window(self, suffix: Literal["", "_2"]) -> int:
        positions = self.network[f"text_encoder{suffix}"].config.max_position_embeddings
        return min(getattr(self.pipeline, f"tokenizer{suffix}").model_max_length, positions)

    def _time_ids(self, size: int, dtype: torch.dtype) -> Tensor:
        scale = self.pipeline.vae_scale_factor
        height, width = (side * scale for side in self.latent[1:])
        row = [height, width, 0, 0, height, width]
        return torch.tensor([row], dtype=dtype, device=self.device).repeat(size, 1)

    def _zeroed(self, cond: Condition, prompts: Sequence[str]) -> Condition:
        """The empty prompt as SDXL's pipeline has it in its unconditional branch."""
        if not (self.sdxl and self.pipeline.config.force_zeros_for_empty_prompt and "" in prompts):
            return cond
        empty = torch.tensor([text == "" for text in prompts], device=self.device)
        pooled = None if cond.pooled is None else cond.pooled.masked_fill(empty[:, None], 0)
        return replace(cond, tokens=cond.tokens.masked_fill(empty[:, None, None], 0), pooled=pooled)

    def _vae_dtype(self) -> torch.dtype:
        vae = self.pipeline.vae
        return torch.float32 if self.sdxl and vae.dtype == torch.float16 and vae.config.force_upcast else vae.dtype

    def _latent_spread(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of the latents per channel, for the SDXL-type autoencoders that state them."""
        config = self.pipeline.vae.config
        if not self.sdxl or config.latents_mean is None or config.latents_std is None:
            return None
        mean, std = (torch.tensor(row).view(1, -1, 1, 1).to(like) for row in (config.latents_mean, config.latents_std))
        return mean, std


def unet_paths(unet: UNet2DConditionModel, group: Group) -> list[str]:
    """List the parameters of a U-Net group, "unet." first, found by the modules' types.

    text_in, cross_kv: `to_k`, `to_v` of every attention layer that reads the prompt. cross_attention (ESD-x): these
    layers whole. non_cross_attention (ESD-u): all but these, the output head and the time embedding, norms included;
    SDXL's size-and-pooled embedding counts as time embedding. attention: self- and cross-attention. all: everything.
    """
    cross, attention = _attention_prefixes(unet, cross=True), _attention_prefixes(unet, cross=False)
    outside = (*cross, *(f"unet.{module}." for module in _OUTSIDE_ESD_U))
    paths = [f"unet.{name}" for name, _ in unet.named_parameters()]
    kv = tuple(f"{prefix}{layer}." for prefix in cross for layer in ("to_k", "to_v"))
    match group:
        case "text_in" | "cross_kv":
            return [path for path in paths if path.startswith(kv)]
        case "cross_attention":
            return [path for path in paths if path.startswith(cross)]
        case "non_cross_attention":
            return [path for path in paths if not path.startswith(outside)]
        case "attention":
            return [path for path in paths if path.startswith((*cross, *attention))]
        case _:
            return paths


def check_pipeline(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, name: str) -> None:
    """Raise InputError for what would load, but be misread by this adapter."""
    unet, kind = pipeline.unet.config, pipeline.scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise InputError(f"model {name!r} predicts {kind!r}; legal: {', '.join(PREDICTIONS)}")
    if (sampler := type(pipeline.scheduler).__name__) not in SAMPLERS:
        raise InputError(f"model {name!r} samples by {sampler}; legal: {', '.join(SAMPLERS)}")
    if unet.in_channels != pipeline.vae.config.latent_channels:
        raise InputError(
            f"U-Net of {name!r} reads {unet.in_channels} channels, its autoencoder makes "
            f"{pipeline.vae.config.latent_channels}: an inpainting or image-conditioned model, not text-to-image"
        )
    for field in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(field) is not None:
            raise InputError(f"U-Net of {name!r} sets {field!r}: distilled or image-conditioned models cannot be read")


def _attention_prefixes(unet: UNet2DConditionModel, *, cross: bool) -> tuple[str, ...]:
    """Paths, dot at the end, of the attention layers that read the prompt (cross) or the image (not cross)."""
    return tuple(
        f"unet.{name}."
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention == cross
    )
