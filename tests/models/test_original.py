"""The original layout at real shapes: names only, on the meta device, against diffusers' own reader."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from expunge.core.errors import InputError
from expunge.models.original import UNET, unet_names

SD1 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Landmarks by which readers tell checkpoints, and the number of U-Net tensors the published files have.
KNOWN = {
    "sd1": (SD1, 686, ("output_blocks.11.0.skip_connection.weight", "output_blocks.5.2.conv.weight")),
    "sdxl": (SDXL, 1680, ("label_emb.0.0.weight", "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight")),
}


@pytest.mark.parametrize("config, count, landmarks", KNOWN.values(), ids=KNOWN.keys())
def test_names_at_real_shapes(config: dict, count: int, landmarks: tuple[str, ...]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    state = unet.state_dict()
    names = unet_names(state, 2)
    assert len(set(names.values())) == len(names) == len(state) == count
    assert set(landmarks) <= set(names.values())
    back = convert_ldm_unet_checkpoint({UNET + names[name]: name for name in state}, unet.config)
    assert back == {name: name for name in state}


def test_what_has_no_place_is_named() -> None:
    with pytest.raises(InputError, match="class_embedding"):
        unet_names(["conv_in.weight", "class_embedding.weight"], 2)
    with pytest.raises(InputError, match="layers_per_block"):
        unet_names(["conv_in.weight"], (1, 2))
    with pytest.raises(InputError, match="odd"):
        unet_names(["mid_block.resnets.0.odd.weight"], 2)
