import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from expunge.core.errors import InputError
from expunge.core.patch import Patch
from expunge.models.load import load
from expunge.models.tiny import tiny_pipeline
from expunge.patches.lowrank import LowRankPatch, product

RANK = 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return load("tiny-unet")


@pytest.fixture(scope="module")
def patch(model):
    chosen = model.select("cross_kv").items()
    return LowRankPatch(
        {
            path: (randn(RANK, w.shape[1], seed=i) * 0.2, randn(w.shape[0], RANK, seed=i + 99) * 0.2)
            for i, (path, w) in enumerate(chosen)
        }
    )


def predict(unet):
    with torch.no_grad():
        return unet(
            randn(1, unet.config.in_channels, 8, 8), torch.tensor([500]), randn(1, 24, unet.config.cross_attention_dim)
        ).sample


def stock(pipeline: StableDiffusionPipeline):
    return predict(pipeline.unet)


def ours(patch, model):
    pipeline = patch.on(model).merged()
    return predict(pipeline.unet)


def test_it_is_a_patch_of_low_rank(model, patch):
    assert isinstance(patch, Patch)
    view = patch.on(model)
    for path in patch.factors:
        moved = view.weight(path) - model.weight(path)
        assert torch.linalg.matrix_rank(moved, rtol=1e-4) == RANK
    assert patch.meta() == {"rank": dict.fromkeys(patch.factors, RANK)}


def test_restore_gives_the_same_patch(patch):
    again = LowRankPatch.restore(patch.tensors(), patch.meta())
    assert again.factors.keys() == patch.factors.keys()
    for path, pair in patch.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(again.factors[path], pair, strict=True))


def test_diffusers_loads_the_file_as_it_is(model, patch, tmp_path):
    save_file(patch.tensors(), tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = tiny_pipeline("tiny-unet")
    base = stock(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    loaded = stock(pipeline)
    assert (loaded - base).abs().max() > 1e-2
    torch.testing.assert_close(loaded, ours(patch, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK, 1])
def test_what_diffusers_saves_is_read_with_its_scale(model, alpha, tmp_path):
    pipeline = tiny_pipeline("tiny-unet")
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    patch = LowRankPatch.of_lora(tensors, alpha=float(alpha))
    assert all(path.startswith("unet.") and path.endswith(".weight") for path in patch.factors)
    torch.testing.assert_close(ours(patch, model), stock(pipeline), rtol=1e-4, atol=1e-5)


def test_pefts_own_names_get_their_root(model):
    pipeline = tiny_pipeline("tiny-unet")
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["attn2.to_k"], init_lora_weights=False)
    wrapped = get_peft_model(pipeline.unet, config)
    tensors = get_peft_model_state_dict(wrapped)
    assert all(name.startswith("base_model.model.") for name in tensors)
    patch = LowRankPatch.of_lora(tensors, root="unet")
    torch.testing.assert_close(ours(patch, model), predict(wrapped), rtol=1e-4, atol=1e-5)


def test_alpha_in_the_file_wins_and_is_folded_into_the_upper_factor():
    tensors = {"unet.a.lora_A.weight": randn(2, 4), "unet.a.lora_B.weight": randn(5, 2)}
    plain = LowRankPatch.of_lora(tensors).factors["unet.a.weight"]
    stored = LowRankPatch.of_lora({**tensors, "unet.a.alpha": torch.tensor(1.0)}, alpha=7.0).factors["unet.a.weight"]
    mapped = LowRankPatch.of_lora(tensors, alpha={"unet.a": 4.0}).factors["unet.a.weight"]
    assert torch.equal(stored[1], plain[1] * 0.5)
    assert torch.equal(mapped[1], plain[1] * 2)
    assert torch.equal(stored[0], plain[0])


def test_the_older_names_of_diffusers_are_read():
    tensors = {"unet.a.lora.down.weight": randn(2, 4), "unet.a.lora.up.weight": randn(5, 2)}
    assert LowRankPatch.of_lora(tensors).factors.keys() == {"unet.a.weight"}


def test_a_convolution_product_is_the_composed_convolution():
    down, up, image = randn(2, 3, 3, 3), randn(5, 2, 1, 1, seed=1), randn(1, 3, 8, 8, seed=2)
    composed = torch.conv2d(torch.conv2d(image, down, padding=1), up)
    torch.testing.assert_close(torch.conv2d(image, product(down, up), padding=1), composed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unet.a.lora_A.weight"], "no partner"),
        (["unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.diff"], "not a LoRA tensor"),
        (["unet.a.lora_B.weight"], "not a LoRA tensor"),
    ],
)
def test_names_outside_pairs_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        LowRankPatch.of_lora({name: randn(2, 2) for name in names})
