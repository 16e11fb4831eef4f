"""What two sentences share, by words and by positions."""

from typing import Any

import pytest
import torch

from expunge.models.load import load
from expunge.ops.alignment import differing, ending, spoken
from expunge.ops.wording import Wording, columns


@pytest.mark.parametrize(
    ("target", "anchor", "middles", "before", "after"),
    [
        ("cat", "dog", ("cat", "dog"), "a", "here"),
        ("red cat", "red dog", ("cat", "dog"), "a red", "here"),
        ("red cat", "blue cat", ("red", "blue"), "a", "cat here"),
        ("cat", "red cat", ("", "red"), "a", "cat here"),
        ("cat", "", ("cat", ""), "a", "here"),
        ("cat cat", "cat", ("cat", ""), "a cat", "here"),
        ("cat", "cat", ("", ""), "a cat", "here"),
    ],
)
def test_shared_words_move_into_the_sentence(
    target: str, anchor: str, middles: tuple[str, str], before: str, after: str
) -> None:
    pair = Wording("a", target, "here"), Wording("a", anchor, "here")
    found = differing(*pair)
    assert tuple(wording.phrase for wording in found) == middles
    assert {(wording.before, wording.after) for wording in found} == {(before, after)}
    assert [wording.text for wording in found] == [wording.text for wording in pair]


def test_a_sentence_without_a_phrase_has_no_position_of_it() -> None:
    model: Any = load("tiny-unet")
    full, bare = Wording("the", "red cat", "on a car"), Wording("the", "", "car")
    found = spoken(model, [bare, full, bare])
    assert not bool(found[[0, 2]].any())
    assert torch.equal(found[1], columns(model, [full])[0]) and bool(found[1].any())
    assert not bool(spoken(model, [bare]).any())


def test_the_ending_begins_behind_the_last_word() -> None:
    cond = load("tiny-unet").encode(["red cat", ""])
    for row, last in zip(ending(cond), cond.last.tolist(), strict=True):
        assert row.tolist() == [place > last for place in range(cond.tokens.shape[1])]
