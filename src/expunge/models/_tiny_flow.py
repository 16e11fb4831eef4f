"""Toy flow-matching transformers: Stable Diffusion 3.5 and FLUX.1 of real classes with random weights.

Both routes of the text, tokens and pooled, are enlarged until each alone clearly moves the prediction, and whatever a
class initialises to zero is drawn anew, so that no test passes on a network that says nothing.
"""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from expunge.models._tiny_text import t5_config, text_config, tiny_t5_tokenizer, tiny_tokenizer

_VALUES, _POOLED = 16.0, 2.0  # text values and pooled layers are this much larger than torch's initialisation


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Build the SD 3.5 type: three encoders, one block with image self-attention, shifted grid, true guidance."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    tokenizer, t5 = tiny_tokenizer(), tiny_t5_tokenizer()
    config = text_config(len(tokenizer), tokenizer.eos_token_id)
    return StableDiffusion3Pipeline(
        transformer=_listening(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(1.5305, 0.0609),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=T5EncoderModel(t5_config(len(t5))),
        tokenizer_3=t5,
    )


def tiny_flux() -> FluxPipeline:
    """Build the FLUX.1 type without guidance embedding (schnell, undistilled ones): true guidance, unshifted grid."""
    return _flux(FlowMatchEulerDiscreteScheduler(shift=1.0), distilled=False)


def tiny_flux_distilled() -> FluxPipeline:
    """Build the FLUX.1-dev type: embedded guidance, grid shifted by the number of image tokens."""
    return _flux(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), distilled=True)


def _flux(scheduler: FlowMatchEulerDiscreteScheduler, *, distilled: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer, t5 = tiny_tokenizer(), tiny_t5_tokenizer()
    return FluxPipeline(
        scheduler=scheduler,
        vae=_autoencoder(0.3611, 0.1159),
        text_encoder=CLIPTextModel(text_config(len(tokenizer), tokenizer.eos_token_id)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5_config(len(t5))),
        tokenizer_2=t5,
        transformer=_listening(transformer),
    )


def _autoencoder(scale: float, shift: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _listening(transformer: nn.Module) -> nn.Module:
    for module in transformer.modules():
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            module.reset_parameters()
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(_VALUES)
        transformer.time_text_embed.text_embedder.linear_1.weight.mul_(_POOLED)
        transformer.time_text_embed.text_embedder.linear_2.weight.mul_(_POOLED)
    return transformer
