"""The toy models listen to their prompts; everything tested on them depends on it."""

import pytest
import torch

from expunge.core.errors import InputError
from expunge.models._names import TINY
from expunge.models.tiny import tiny_names, tiny_pipeline, tiny_tokenizer

from .conftest import seeded


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_prompt_moves_prediction_and_image(model):
    state = model.noised(torch.randn(4, *model.latent, generator=seeded()), rng=seeded(1))
    strawberry, banana, none = (model.predict(state, model.encode([text])) for text in ("strawberry", "banana", ""))
    assert relative(strawberry, none) > 0.2
    assert relative(strawberry, banana) > 0.2
    images = model.generate(["strawberry", "banana"], seeds=[3, 3], guidance_scale=4.0, steps=6)
    assert (images[0] - images[1]).abs().mean() > 0.02
    saturated = ((images == 0) | (images == 1)).float().mean()
    assert saturated < 0.2 and images.std() > 0.05


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = tiny_pipeline("tiny-unet", seed=1), tiny_pipeline("tiny-unet", seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    again = tiny_pipeline("tiny-unet", seed=1)
    assert torch.equal(one.unet.conv_in.weight, again.unet.conv_in.weight)
    assert torch.equal(one.text_encoder.get_input_embeddings().weight, again.text_encoder.get_input_embeddings().weight)
    assert not torch.equal(one.unet.conv_in.weight, other.unet.conv_in.weight)


def test_names():
    assert tiny_names() == TINY
    with pytest.raises(InputError, match=r"unknown tiny model 'huge'; legal: tiny-flux, tiny-flux-distilled, tiny-sd3"):
        tiny_pipeline("huge")


def test_tokenizer_spells_anything():
    tokenizer = tiny_tokenizer()
    assert tokenizer.tokenize("a photo of a Strawberry") == ["a</w>", "photo</w>", "of</w>", "a</w>", "strawberry</w>"]
    for text in ("zebra ☃ 北京 ñ", "\U0001f353!?", "x" * 12):
        ids = tokenizer(text).input_ids[1:-1]
        assert ids and tokenizer.unk_token_id not in ids
