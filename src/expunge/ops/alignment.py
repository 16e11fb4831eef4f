"""The same sentence about two things: which positions of its text correspond."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.generator import Generator
from expunge.ops.wording import Wording, columns


def differing(target: Wording, anchor: Wording) -> tuple[Wording, Wording]:
    """Move the words that two phrases share at their ends into the sentence: longest common beginning, then ending.

    "red cat" and "red dog" differ in "cat" and "dog" only. Words, not tokens, are compared.
    """
    old, new = target.phrase.split(), anchor.phrase.split()
    head = _common(old, new)
    tail = _common(old[head:][::-1], new[head:][::-1])
    end = len(old) - tail
    before = " ".join([*target.before.split(), *old[:head]])
    after = " ".join([*old[end:], *target.after.split()])
    middles = (" ".join(words[head : len(words) - tail]) for words in (old, new))
    one, two = (Wording(before, middle, after) for middle in middles)
    return one, two


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    count = 0
    while count < min(len(one), len(two)) and one[count] == two[count]:
        count += 1
    return count


def spoken(model: Generator, found: Sequence[Wording]) -> Bool[Tensor, "b l"]:
    """Positions of each wording's phrase, none where it has no phrase; `columns` for wordings that may be empty."""
    marked = torch.zeros_like(model.encode([wording.text for wording in found]).mask)
    rows = [row for row, wording in enumerate(found) if wording.phrase]
    if rows:
        marked[rows] = columns(model, [found[row] for row in rows])
    return marked


def surroundings(
    model: Generator, pairs: Sequence[tuple[Wording, Wording]]
) -> list[tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]]:
    """Rows of all other words in a sentence about the target, facing the same words' rows in one about the anchor.

    The words that differ are left out on both sides; opening token, shared words, closing token and padding remain, in
    order, cut to the shorter side. Identical sentences keep every row. Source: MACE (arXiv:2403.06135), refinement.
    """
    apart = [differing(*pair) for pair in pairs]
    sides = []
    for found in zip(*apart, strict=True):
        tokens, said = model.encode([wording.text for wording in found]).tokens, spoken(model, found)
        sides.append([rows[~dropped] for rows, dropped in zip(tokens, said, strict=True)])
    shared = [min(len(old), len(new)) for old, new in zip(*sides, strict=True)]
    return [(old[:n], new[:n]) for old, new, n in zip(*sides, shared, strict=True)]


def ending(cond: Condition) -> Bool[Tensor, "b l"]:
    """Positions of the first closing token and of all padding behind it."""
    place = torch.arange(cond.mask.shape[1], device=cond.mask.device)
    return place >= cond.mask.sum(1, keepdim=True) - 1
