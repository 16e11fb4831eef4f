"""Rows of conditions: every encoder's band by itself, every embedded guidance scale in turn."""

import pytest
import torch

from expunge.core.condition import GUIDANCE, Condition
from expunge.core.errors import InputError
from expunge.models.tiny import tiny_pipeline
from expunge.models.unet import UNetGenerator
from expunge.ops.rows import aligned_tails, at_scales, bands, encode_many, scale_count, subject_row


def condition(words: list[int], *, cut: int = 0, guided: bool = False) -> Condition:
    """Row i of prompt p is (p, i); a band opens with a start token if it is the first, and closes with one."""
    size, end = len(words), 6
    where = torch.arange(2 * end if cut else end)
    tokens = torch.stack([torch.stack([torch.full_like(where, p), where], dim=1) for p in range(size)]).float()
    first = torch.arange(end)[None] < torch.tensor(words)[:, None] + 2
    second = torch.arange(end)[None] < torch.tensor(words)[:, None] + 1
    return Condition(
        tokens=tokens,
        mask=torch.cat([first, second], dim=1) if cut else first,
        last=torch.tensor(words),
        extra={GUIDANCE: torch.ones(size)} if guided else {},
        bands=((0, end), (end, 2 * end)) if cut else (),
    )


def test_each_band_has_its_own_last_word() -> None:
    clip, t5 = bands(condition([0, 1, 3], cut=6))
    assert clip.last.tolist() == [0, 1, 3]  # one start token before the words
    assert t5.last.tolist() == [0, 0, 2]  # none; the empty prompt gives its closing token
    assert subject_row(t5, 2).tolist() == [[2.0, 8.0]]
    old, new = aligned_tails(t5, t5, 2)
    assert old[:, 1].tolist() == new[:, 1].tolist() == [8.0, 9.0, 10.0, 11.0]
    whole = condition([0, 1, 3])
    assert bands(whole) == [whole]


def test_every_prompt_at_every_scale() -> None:
    both = at_scales(condition([1, 2], guided=True), (1.0, 3.5))
    assert both.extra[GUIDANCE].tolist() == [1.0, 1.0, 3.5, 3.5]
    assert both.tokens[:, 0, 0].tolist() == [0.0, 1.0, 0.0, 1.0]
    plain = condition([1, 2])
    assert at_scales(plain, (1.0, 3.5)) is plain
    assert (scale_count(both, (1.0, 3.5)), scale_count(plain, (1.0, 3.5))) == (2, 1)
    with pytest.raises(InputError, match="no guidance scales"):
        at_scales(plain, ())


def test_stacking_and_picking_keep_bands_and_scales() -> None:
    cond = condition([1, 2], cut=6, guided=True)
    stacked = Condition.cat([cond, cond.at(4.0)])
    assert stacked.bands == cond.bands and stacked.extra[GUIDANCE].tolist() == [1.0, 1.0, 4.0, 4.0]
    picked = stacked.take(torch.tensor([3]))
    assert picked.bands == cond.bands and picked.extra[GUIDANCE].tolist() == [4.0]


def test_many_prompts_are_encoded_once_each_in_batches(monkeypatch) -> None:
    model, asked = UNetGenerator(tiny_pipeline("tiny-unet"), "tiny-unet"), []
    plain = model.encode
    monkeypatch.setattr(model, "encode", lambda prompts: (asked.append(list(prompts)), plain(prompts))[1])
    prompts = ["cat", "dog", "cat", "car", "dog", "banana"]
    found = encode_many(model, prompts, size=3)
    assert asked == [["cat", "dog", "car"], ["banana"]]
    torch.testing.assert_close(found.tokens, plain(prompts).tokens)
    assert found.last.tolist() == plain(prompts).last.tolist()
