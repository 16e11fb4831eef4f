"""The text tower lets words compose: the terms that ask it of CLIP, and the tower that ships."""

from pathlib import Path

import pytest
import torch
from training import composition, world
from transformers import CLIPTextModel, CLIPTokenizer

EMBEDDED = Path(__file__).parents[2] / "src" / "expunge" / "embedded"


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def speaker() -> composition.Speaker:
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "emoji-unet" / "tokenizer", local_files_only=True)
    return composition.Speaker(world.load(), tokenizer)


def test_states_that_add_up_do_not_interact_and_others_do() -> None:
    things, styles = torch.randn(2, 500, 2, 4, 8, generator=random())
    added = torch.stack([things[:, i] + styles[:, j] for i in (0, 1) for j in (0, 1)])
    assert composition.interaction(added) < 1e-10
    unrelated = torch.randn(4, 500, 4, 8, generator=random(1))
    assert composition.interaction(unrelated) == pytest.approx(1, abs=0.1)


def test_contrast_is_least_where_the_same_thing_lies_together() -> None:
    things = torch.arange(5).repeat(4)
    apart = torch.eye(5)[things]
    assert composition.together(apart, things) < 1.2 < composition.together(apart, things.sort().values)


def test_a_caption_is_what_the_tokenizer_makes_of_it_and_its_places_end_the_words(speaker) -> None:
    for form in composition.FORMS:
        ids, places = speaker.say(form, "ice cream", "sepia", "pink")
        text = form.format(c="ice cream", s="sepia", b="pink")
        assert ids == speaker.tokenizer(text, padding="max_length").input_ids
        words = [speaker.tokenizer.convert_ids_to_tokens(ids[place]) for place in places]
        assert words == ["cream</w>", "sepia</w>", "pink</w>", "<|endoftext|>"]


def test_no_quad_says_a_held_out_pair(speaker) -> None:
    data = speaker.data
    kept = {
        (data.concepts[c], data.styles[s]) for c, s, h in zip(data.concept, data.style, data.held_out, strict=True) if h
    }
    assert len(kept) == 30
    quads = speaker.quads(400, random())
    said = speaker.tokenizer.batch_decode(quads.ids.flatten(0, 1), skip_special_tokens=True)
    for caption, thing in zip(said, quads.things.flatten().tolist(), strict=True):
        words = caption.replace(",", "").split()
        assert not any((data.concepts[thing], style) in kept for style in data.styles if style in words), caption
    assert any("ink" in caption for caption in said)


@torch.no_grad()
def test_the_tower_that_ships_keeps_pairs_it_never_met_with_their_own_thing(speaker) -> None:
    tower = CLIPTextModel.from_pretrained(EMBEDDED / "emoji-unet" / "text_encoder", local_files_only=True).eval()
    seen, held_out = composition.composed(tower, speaker)
    assert seen >= 0.97
    assert held_out >= 0.9
