"""Models without weights: published ones by their numbers, ours against what `load` gives."""

import json
import shutil

import pytest
import torch

from expunge.core.errors import InputError
from expunge.models._names import EMBEDDED, SHAPES, model_names, shape_names
from expunge.models.load import load
from expunge.models.skeleton import skeleton
from expunge.models.tiny import tiny_pipeline

# Parameters of every component, as the published weight files have them.
PARAMETERS = {
    "sd-1.4": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sdxl": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
    "sd3.5-medium": {
        "transformer": 2_243_171_520,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
        "vae": 83_819_683,
    },
    "flux.1-dev": {
        "transformer": 11_901_408_320,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
    },
    "flux.1-schnell": {
        "transformer": 11_891_178_560,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
    },
}


@pytest.fixture(scope="module")
def shapes():
    """Every published shape, built once."""
    return {name: skeleton(name) for name in PARAMETERS}


def drawn(model):
    return {path: (tuple(tensor.shape), tensor.dtype) for path, tensor in model.parameters_by_path().items()}


def test_all_published_shapes_are_here_and_none_is_a_model_to_load():
    assert set(shape_names()) == set(PARAMETERS)
    assert not set(shape_names()) & set(model_names())
    for name in shape_names():
        assert "hub" in json.loads((SHAPES / f"{name}.json").read_text())["source"]
    with pytest.raises(InputError, match="unknown model 'sdxl'"):
        load("sdxl")


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_component_has_the_published_number_of_parameters(shapes, name):
    parts = shapes[name].network.named_children()
    assert {part: sum(p.numel() for p in module.parameters()) for part, module in parts} == PARAMETERS[name]
    assert all(tensor.is_meta for tensor in shapes[name].network.state_dict().values())


@pytest.mark.parametrize(("name", "count", "width"), [("sd-1.4", 32, 768), ("sdxl", 140, 2048)])
def test_unets_read_text_in_their_cross_attention(shapes, name, count, width):
    sites = shapes[name].sites("text_in")
    assert len(sites) == count and {site.weight.shape[1] for site in sites} == {width}
    assert all(site.path.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")) for site in sites)
    first = "unet.down_blocks.0" if name == "sd-1.4" else "unet.down_blocks.1"
    assert sites[0].path == f"{first}.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert sites[-1].path.startswith("unet.mid_block.attentions.0.transformer_blocks.")


FLOWS = {  # hidden width, pooled width, joint blocks with text projections
    "sd3.5-medium": (1536, 2048, 24),
    "flux.1-dev": (3072, 768, 19),
    "flux.1-schnell": (3072, 768, 19),
}


@pytest.mark.parametrize("name", FLOWS)
def test_mmdits_read_text_in_two_layers(shapes, name):
    width, pooled, blocks = FLOWS[name]
    sites = {site.path: tuple(site.weight.shape) for site in shapes[name].sites("text_in")}
    assert sites == {
        "transformer.time_text_embed.text_embedder.linear_1.weight": (width, pooled),
        "transformer.context_embedder.weight": (width, 4096),
    }
    assert len(shapes[name].select("cross_kv")) == 4 * blocks  # add_k_proj and add_v_proj, weights and biases


def test_guidance_is_distilled_into_dev_alone(shapes):
    assert [shapes[name].distilled for name in FLOWS] == [False, True, False]
    assert shapes["flux.1-dev"].latent == (16, 128, 128) and shapes["sd-1.4"].latent == (4, 64, 64)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["emoji-unet", "tiny-sdxl"])
def test_a_skeleton_has_the_names_shapes_and_dtypes_of_the_model(name, dtype):
    assert drawn(skeleton(name, dtype=dtype)) == drawn(load(name, dtype=dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_t5_is_as_wide_as_transformers_loads_it(tmp_path, dtype):
    tiny_pipeline("tiny-sd3").save_pretrained(tmp_path)
    real = drawn(load(tmp_path, dtype=dtype))
    assert drawn(skeleton(tmp_path, dtype=dtype)) == real
    assert (torch.float32 in {kind for _, kind in real.values()}) == (dtype == "float16")


def test_a_folder_needs_no_weights(tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(EMBEDDED / "emoji-unet", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert drawn(skeleton(folder)) == drawn(skeleton("emoji-unet"))
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(InputError, match=r"vae.* has no config.json"):
        skeleton(folder)


def test_names_without_a_model_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"unknown model 'sd-1\.5'; legal: .*flux\.1-dev.*tiny-unet"):
        skeleton("sd-1.5")
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(InputError, match=r"PixArtAlphaPipeline.*legal: FluxPipeline"):
        skeleton(tmp_path)
    with pytest.raises(InputError, match="unknown dtype 'int4'"):
        skeleton("tiny-unet", dtype="int4")
