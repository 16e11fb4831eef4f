"""The network that `training.flux` trains, and how it is asked: FLUX.1's transformer and T5-type encoder, slim."""

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from training import clip, text

WIDTH, HEADS, BLOCKS = 192, 3, (3, 6)
CENTRE, SPREAD = 0.8, 1.2  # of logit t: what a picture shows is settled where it is mostly noise


class FluxNet(nn.Module):
    """Transformer and T5 encoder, trained as one."""

    def __init__(self, vocabulary: int, *, distilled: bool, blocks: tuple[int, int] = BLOCKS) -> None:
        """Dual and single `blocks` over 16 image tokens (2 × 2 latents each) and 20 text tokens."""
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=clip.WIDTH,
            guidance_embeds=distilled,
            axes_dims_rope=(16, 24, 24),
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=WIDTH,
                d_kv=32,
                d_ff=384,
                num_layers=2,
                num_heads=6,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                dropout_rate=0.0,
            )
        )
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        self.register_buffer("places", places, persistent=False)

    def read(self, ids: Tensor) -> Tensor:
        """Token states "b 20 d"."""
        return self.t5(ids).last_hidden_state

    def velocity(self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor, scale: Tensor | None = None) -> Tensor:
        """Velocity "b 16 64" at packed latents x and levels t in [0, 1]; `scale` is a distilled model's."""
        return self.transformer(
            hidden_states=x,
            timestep=t,
            guidance=scale,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            img_ids=self.places,
            txt_ids=torch.zeros(states.shape[1], 3),
            return_dict=False,
        )[0]


def pack(z: Tensor) -> Tensor:
    """Latents "b 16 8 8" to tokens "b 16 64", as FluxPipeline packs them."""
    return z.view(-1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 64)


class Words:
    """Caption to T5's token numbers and CLIP's pooled text."""

    def __init__(self, tokenizer: T5TokenizerFast) -> None:
        """Load the frozen tower."""
        self.tokenizer, self.embed = tokenizer, text.Embedder()

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Numbers "b 20" and pooled text "b d"."""
        batch = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return batch.input_ids, self.embed(captions)[1]


def levels(n: int, random: torch.Generator) -> Tensor:
    """Draw n noise levels, logit t normal, stratified: every batch sees all of them."""
    u = (torch.rand(n, generator=random) + torch.randperm(n, generator=random)) / n
    return torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).mul(SPREAD).add(CENTRE).sigmoid()
