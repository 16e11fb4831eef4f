"""Which tensors belong to which group: counted on the real shapes (meta device), and proved by hooks on the toys."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from expunge.core.errors import InputError
from expunge.core.generator import Hook
from expunge.models.unet import GROUPS, unet_paths

from .conftest import seeded


@pytest.fixture(scope="module")
def sd14():
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def weights(unet, paths):
    shapes = {f"unet.{name}": tensor.numel() for name, tensor in unet.named_parameters()}
    return sum(shapes[path] for path in paths)


def test_sd14_counts(sd14):
    """The spec's numbers: 32 key and value matrices with 19,169,280 weights in 16 attn2 modules."""
    kv = unet_paths(sd14, "text_in")
    assert len(kv) == 32 and weights(sd14, kv) == 19_169_280
    assert kv == unet_paths(sd14, "cross_kv")
    cross = unet_paths(sd14, "cross_attention")
    assert len({path.partition("attn2")[0] for path in cross}) == 16
    assert set(cross) == {f"unet.{name}" for name, _ in sd14.named_parameters() if ".attn2." in name}
    assert len(cross) == 16 * 5  # q, k, v, out, and out's bias


def test_sd14_esd_u(sd14):
    rest = unet_paths(sd14, "non_cross_attention")
    expected = {
        f"unet.{name}"
        for name, _ in sd14.named_parameters()
        if ".attn2." not in name and not name.startswith(("time_embedding.", "conv_norm_out.", "conv_out."))
    }
    assert set(rest) == expected
    assert any("norm" in path for path in rest) and "unet.conv_in.weight" in rest
    assert any("time_emb_proj" in path for path in rest)  # the blocks' own projections are not `time_embed`
    assert weights(sd14, unet_paths(sd14, "all")) == 859_520_964


def test_sdxl_counts(sdxl):
    kv = unet_paths(sdxl, "text_in")
    assert len(kv) == 140
    assert all(".attn2." in path for path in kv)
    rest = unet_paths(sdxl, "non_cross_attention")
    assert not any(path.startswith(("unet.add_embedding", "unet.time_embedding", "unet.conv_out")) for path in rest)
    assert weights(sdxl, unet_paths(sdxl, "all")) == 2_567_463_684
    attention = unet_paths(sdxl, "attention")
    assert set(unet_paths(sdxl, "cross_attention")) < set(attention)
    assert {path.split(".attn")[1][0] for path in attention} == {"1", "2"}


def test_meaning_not_names():
    """A U-Net whose first attention also reads the prompt has it in text_in, whatever the layer is called."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention=True,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    names = {path.split(".")[-3] for path in unet_paths(unet, "text_in")}
    assert names == {"attn1", "attn2"}


@pytest.mark.parametrize(("name", "modules"), [("tiny-unet", 4), ("tiny-unet-v", 4), ("tiny-sdxl", 8)])
def test_toy_counts(models, name, modules):
    model = models[name]
    sites = model.sites("text_in")
    assert len(sites) == 2 * modules
    assert [site.role for site in sites] == ["key", "value"] * modules
    assert [site.path for site in sites] == list(model.select("text_in"))
    assert all(site.rows == (0, site.weight.shape[0]) and site.reads == "tokens" for site in sites)
    assert len(model.select("cross_attention")) == 5 * modules
    assert len(model.select("attention")) == 10 * modules
    assert len(model.sites("cross_attention")) == 2 * modules and model.sites("text_encoder") == []
    assert model.sites("non_cross_attention") == []
    text, network = model.select("text_encoder"), model.select("all")
    assert all(path.startswith("text_encoder") for path in text) and all(path.startswith("unet.") for path in network)
    assert ("text_encoder_2.text_projection.weight" in text) == (name == "tiny-sdxl")


EDITED = {
    ("tiny-unet", "text_in"): [
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
    ],
    ("tiny-sdxl", "text_in"): [
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight",
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v.weight",
        "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "unet.up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k.weight",
        "unet.up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_v.weight",
        "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v.weight",
        "unet.up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_k.weight",
        "unet.up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_v.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.weight",
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_v.weight",
    ],
    ("tiny-flux-distilled", "text_in"): [
        "transformer.time_text_embed.text_embedder.linear_1.weight",
        "transformer.context_embedder.weight",
    ],
    ("tiny-flux-distilled", "cross_kv"): [
        "transformer.transformer_blocks.0.attn.add_k_proj.weight",
        "transformer.transformer_blocks.0.attn.add_v_proj.weight",
        "transformer.transformer_blocks.1.attn.add_k_proj.weight",
        "transformer.transformer_blocks.1.attn.add_v_proj.weight",
    ],
}
ROLES = {"to_k": "key", "add_k_proj": "key", "to_v": "value", "add_v_proj": "value"}
ROLES |= {"linear_1": "pooled", "context_embedder": "context"}


@pytest.mark.parametrize(("name", "group"), EDITED)
def test_edited_sites_by_name(models, name, group):
    """Every one of them, as it is written into artifacts."""
    sites, paths = models[name].sites(group), EDITED[name, group]
    assert [site.path for site in sites] == paths
    assert [site.role for site in sites] == [ROLES[path.split(".")[-2]] for path in paths]
    if models[name].family == "unet":
        assert [site.path for site in models[name].sites("cross_kv")] == paths


def test_text_in_reads_the_prompt_and_nothing_else(model):
    """Inputs of text_in layers: bitwise the same for other x and t, different for another prompt."""
    sites = model.sites("text_in")
    layers = [site.path.removesuffix(".weight") for site in sites]
    others = [path.replace("to_k", "to_q") for path in layers if path.endswith("to_k")]
    if model.family == "mmdit":  # the text stream: modulated by t in its first block, mixed with the image after
        others = [site.path.removesuffix(".weight") for site in model.sites("cross_kv")]

    def inputs(seed, prompt):
        seen = {}
        hooks = [
            Hook(path, lambda _, args, output, path=path: seen.update({path: args[0]})) for path in layers + others
        ]
        state = model.noised(torch.randn(1, *model.latent, generator=seeded(seed)), rng=seeded(seed + 1))
        model.view(hooks=hooks).predict(state, model.encode([prompt]))
        return seen

    first, second, third = inputs(0, "strawberry"), inputs(5, "strawberry"), inputs(0, "banana")
    assert set(first) == {*layers, *others}
    assert all(torch.equal(first[path], second[path]) for path in layers)
    assert not any(torch.equal(first[path], third[path]) for path in layers)
    assert not any(torch.equal(first[path], second[path]) for path in others)
    cond = model.encode(["strawberry"])
    for site, path in zip(sites, layers, strict=True):
        assert torch.equal(first[path], cond.tokens if site.reads == "tokens" else cond.pooled)


def test_groups_partition(model):
    cross, rest, everything = (set(model.select(g)) for g in ("cross_attention", "non_cross_attention", "all"))
    assert not cross & rest and cross | rest < everything
    attention = set(model.select("attention"))
    assert set(model.select("cross_kv")) < cross <= attention < everything
    assert (cross == attention) == model.name.startswith("tiny-flux")  # FLUX has text in every attention
    assert not set(model.select("text_in")) & rest


def test_unknown_and_empty_groups(model):
    from expunge.models._base import check_group

    with pytest.raises(InputError, match="unknown parameter group 'xattn'; legal: all, attention, cross_attention"):
        check_group("xattn", GROUPS)
    bare = model.view()
    bare._base = {path: tensor for path, tensor in model._base.items() if not path.startswith("text_encoder")}
    with pytest.raises(InputError, match="group 'text_encoder' matches no parameter of model"):
        bare.select("text_encoder")


def test_condition_layout(unet):
    """last is the last word before the closing token; mask ends with the first closing token."""
    model = unet
    cond = model.encode(["", "strawberry", "a photo of a cat", "cat " * 40])
    assert cond.last.tolist() == [0, 1, 5, 22]
    assert cond.mask.sum(1).tolist() == [2, 3, 7, 24]
    assert cond.mask.dtype == torch.bool and len(cond) == 4
    tokens = model.pipeline.tokenizer("strawberry").input_ids
    assert len(tokens) == 3
    again = model.encode(["strawberry"])
    assert torch.allclose(again.subject, cond.take(torch.tensor([1])).subject, atol=1e-5)
    assert not torch.allclose(cond.subject[1], cond.subject[2], atol=1e-2)
