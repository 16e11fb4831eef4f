"""Real classes at toy size with random weights: for tests, docs and CI.

Untrained networks barely listen to their prompt, and what is tested on a model that ignores its prompt is tested
vacuously. So cross-attention values are enlarged here until the prompt clearly moves the prediction; the tests of this
file hold it to that before anything else relies on it.
"""

import warnings
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from expunge.core.errors import unknown
from expunge.models._tiny_flow import tiny_flux, tiny_flux_distilled, tiny_sd3
from expunge.models._tiny_text import text_config, tiny_tokenizer

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline | StableDiffusion3Pipeline | FluxPipeline

_GAIN = 8.0  # cross-attention values are this much larger than torch's default initialisation


def tiny_names() -> tuple[str, ...]:
    """List the toy models.

    SD 1.x type (eps), SD 2.x type (v, zero terminal SNR), SDXL type (eps, two encoders); SD 3.5 type, FLUX.1 type
    without and with embedded guidance (velocity).
    """
    return tuple(_BUILDERS)


def tiny_pipeline(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Build the stock diffusers pipeline of a toy model, weights drawn from `seed` alone; unknown names: InputError."""
    if name not in _BUILDERS:
        raise unknown("tiny model", name, _BUILDERS)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipelines warn about absent safety checkers
        torch.manual_seed(seed)
        pipeline = _BUILDERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own `to` logs advice meant for large models
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def _listening(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            module.to_v.weight.data.mul_(_GAIN)
    return unet


def _sd(unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> StableDiffusionPipeline:
    tokenizer = tiny_tokenizer()
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(text_config(len(tokenizer), tokenizer.eos_token_id)),
        tokenizer=tokenizer,
        unet=_listening(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd1() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return _sd(unet, scheduler)


def _sd2() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    return _sd(unet, scheduler)


def _sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    tokenizer = tiny_tokenizer()
    config = text_config(len(tokenizer), tokenizer.eos_token_id)
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=_listening(unet),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


_BUILDERS: dict[str, Callable[[], Pipeline]] = {
    "tiny-unet": _sd1,
    "tiny-unet-v": _sd2,
    "tiny-sdxl": _sdxl,
    "tiny-sd3": tiny_sd3,
    "tiny-flux": tiny_flux,
    "tiny-flux-distilled": tiny_flux_distilled,
}
