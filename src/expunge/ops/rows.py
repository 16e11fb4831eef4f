"""Rows of conditions and states: points out of a batch, and embedding rows out of a prompt."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expunge.core.condition import GUIDANCE, Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State

Rows = Literal["word", "words", "tail", "window"]
"""Which rows of a prompt: its last word's; opening token, words and first closing token; last word to the window's
end; all."""


def pick_state(state: State, index: Int[Tensor, "n"]) -> State:
    """State whose row i is row index[i] of `state`; an index may repeat."""
    return State(x=state.x[index], t=None if state.t is None else state.t[index])


def join_states(states: list[State]) -> State:
    """One state that holds the rows of all given states, in order."""
    times = [state.t for state in states if state.t is not None]
    return State(x=torch.cat([state.x for state in states]), t=torch.cat(times) if times else None)


def encode_parts(model: Generator, prompts: Sequence[str], size: int = 64) -> Iterator[Condition]:
    """Encode any number of prompts, `size` at a time: a thousand at once would need gigabytes."""
    for start in range(0, len(prompts), size):
        yield model.encode(prompts[start : start + size])


def encode_many(model: Generator, prompts: Sequence[str], size: int = 64) -> Condition:
    """Encode any number of prompts as one condition, each wording once and `size` at a time."""
    wordings = list(dict.fromkeys(prompts))
    found = Condition.cat(list(encode_parts(model, wordings, size)))
    if len(wordings) == len(prompts):
        return found
    place = {wording: index for index, wording in enumerate(wordings)}
    return found.take(torch.tensor([place[prompt] for prompt in prompts], device=found.tokens.device))


def subject_row(cond: Condition, row: int) -> Float[Tensor, "1 d"]:
    """The one embedding row of prompt `row` at its last subject token (the start token for an empty prompt)."""
    return cond.tokens[row, cond.last[row]][None]


def tail_rows(cond: Condition, row: int, length: int | None = None) -> Float[Tensor, "n d"]:
    """Embedding rows of prompt `row` from its last subject token to the window's end: word, closing token, padding.

    length cuts the run from its far end; without it n = window − last.
    """
    start = int(cond.last[row])
    return cond.tokens[row, start:][:length]


def aligned_tails(target: Condition, anchor: Condition, row: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Tails of two prompts, both starting at their own last subject token and cut to the shorter one.

    n = window − max(last_target, last_anchor), as in the 2023 script of UCE (arXiv:2308.14761).
    """
    length = target.tokens.shape[1] - max(int(target.last[row]), int(anchor.last[row]))
    return tail_rows(target, row, length), tail_rows(anchor, row, length)


def bands(cond: Condition) -> list[Condition]:
    """Cut a condition into what each encoder wrote, in order, each with its own last word; one band: itself alone."""
    if not cond.bands:
        return [cond]
    parts = [(cond.tokens[:, start:end], cond.mask[:, start:end]) for start, end in cond.bands]
    return [Condition(tokens=rows, mask=mask, last=(mask.sum(1) - 2).clamp(min=0)) for rows, mask in parts]


def row_pairs(
    target: Condition, anchor: Condition, route: str, which: Literal["word", "tail", "window"]
) -> list[tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]]:
    """Rows of each target prompt with those of the anchor they face, all encoders' rows of a prompt together.

    route "pooled" is the one pooled row of each. word and tail pair up from the last words on, window by position.
    """
    if route == "pooled":
        return list(zip(pooled_rows(target), pooled_rows(anchor), strict=True))
    if which == "window":
        return list(zip(target.tokens, anchor.tokens, strict=True))
    sides = list(zip(bands(target), bands(anchor), strict=True))
    pairs = []
    for row in range(len(target)):
        if which == "tail":
            found = [aligned_tails(old, new, row) for old, new in sides]
        else:
            found = [(subject_row(old, row), subject_row(new, row)) for old, new in sides]
        pairs.append((torch.cat([old for old, _ in found]), torch.cat([new for _, new in found])))
    return pairs


def prompt_rows(cond: Condition, route: str, which: Rows) -> list[Float[Tensor, "n d"]]:
    """The chosen rows of each prompt, all encoders' together; route "pooled" is its one pooled row."""
    if route == "pooled":
        return pooled_rows(cond)
    if which == "window":
        return list(cond.tokens)
    if which == "words":
        return [tokens[mask] for tokens, mask in zip(cond.tokens, cond.mask, strict=True)]
    pick = tail_rows if which == "tail" else subject_row
    return [torch.cat([pick(band, row) for band in bands(cond)]) for row in range(len(cond))]


def pooled_rows(cond: Condition) -> list[Float[Tensor, "1 p"]]:
    """Each prompt's pooled text as one row; raises InputError where a model's condition has none."""
    if cond.pooled is None:
        raise InputError("a layer reads the pooled text, which this model does not encode")
    return list(cond.pooled[:, None])


def scale_count(cond: Condition, scales: Sequence[float]) -> int:
    """At how many guidance scales a prompt is taught: at all given, or once where the network reads none.

    Raises InputError for no scales.
    """
    if not scales:
        raise InputError("no guidance scales; give one or more, such as 1 and 3.5")
    return len(scales) if GUIDANCE in cond.extra else 1


def at_scales(cond: Condition, scales: Sequence[float]) -> Condition:
    """Every prompt once at every embedded guidance scale, scale by scale; other models' prompts as they are.

    A guidance-distilled network answers scale g with its own v_u + g (v_c - v_u), each g through its own activations:
    what was taught at one is only hoped for at another. Raises InputError for no scales.
    """
    parts = [cond.at(scale) for scale in scales[: scale_count(cond, scales)]]
    return parts[0] if len(parts) == 1 else Condition.cat(parts)
