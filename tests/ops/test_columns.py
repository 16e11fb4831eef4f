"""Positions of a phrase in the window, where words are of several tokens and stand in other words."""

from typing import Any

import pytest

from expunge.core.generator import Generator
from expunge.models.load import load
from expunge.ops.wording import Wording, columns

LINES = (
    Wording("a photo of a", "zebra", ""),
    Wording("a photo of a", "zebra", "on a plain background"),
    Wording("a photo of a", "red caterpillar", "on a leaf"),
    Wording("a caterpillar and a", "cat", "and a caterpillar"),
    Wording("", "zebra", "zebra"),
)


@pytest.fixture(scope="module", params=["emoji-flux", "emoji-unet"])
def told(request: pytest.FixtureRequest) -> tuple[Generator, Any]:
    """A model and the tokenizer of the encoder whose rows it reads: T5's kind, or CLIP's."""
    model: Any = load(request.param)
    return model, model.pipeline.tokenizer_2 if request.param == "emoji-flux" else model.pipeline.tokenizer


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text)
def test_every_token_of_a_phrase_is_found_and_no_other(line: Wording, told: tuple[Generator, Any]) -> None:
    """The tokenizer itself is the oracle: what stands at the marked positions is the phrase, from its own place on."""
    model, tokenizer = told
    whole = tokenizer(line.text).input_ids
    (places,) = columns(model, [line]).nonzero(as_tuple=True)[1:]
    own = tokenizer(line.phrase, add_special_tokens=False).input_ids
    assert len(own) > len(line.phrase.split()) or line.phrase == "cat"
    assert [whole[place] for place in places.tolist()] == own
    before = tokenizer(line.before, add_special_tokens=False).input_ids
    opening = whole.index((before + own)[0])
    assert places[0] == opening + len(before)
