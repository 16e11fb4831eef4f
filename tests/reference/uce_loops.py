"""UCE in float64, slow and literal as specs/closed-form-reference.md section 1 has it: one layer, one row at a time.

Nothing here is shared with the library: no common operator, no Gram products, an explicit inverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """An encoded prompt: all rows of its window, and the index of its last word."""

    rows: Matrix
    last: int


def edit_2023(
    weight: Matrix,
    pairs: Sequence[tuple[Text, Text]],
    kept: Sequence[Text],
    *,
    lam: float,
    erase: float,
    preserve: float,
    technique: str,
) -> Matrix:
    """New weight of one layer; `kept` must already contain the empty prompt."""
    d = weight.shape[1]
    top, bottom = lam * weight, lam * np.eye(d)
    for old, new in pairs:
        far = max(old.last, new.last)
        o = old.rows[old.last : len(old.rows) - (far - old.last)]
        g = new.rows[new.last : len(new.rows) - (far - new.last)]
        before, values = o @ weight.T, g @ weight.T
        if technique == "tensor":
            unit = before / np.sqrt((before**2).sum())
            values = values - (unit * values).sum() * unit
        for row, value in zip(o, values, strict=True):
            top = top + erase * np.outer(value, row)
            bottom = bottom + erase * np.outer(row, row)
    for text in kept:
        for row in text.rows:
            top = top + preserve * np.outer(weight @ row, row)
            bottom = bottom + preserve * np.outer(row, row)
    return top @ np.linalg.inv(bottom)


def edit_2025(
    weight: Matrix,
    pairs: Sequence[tuple[Text, Text]],
    kept: Sequence[Text],
    *,
    lam: float,
    erase: float,
    preserve: float,
) -> Matrix:
    """New weight of one layer from one row per text."""
    d = weight.shape[1]
    top, bottom = lam * weight, lam * np.eye(d)
    for old, new in pairs:
        o, g = old.rows[old.last], new.rows[new.last]
        top = top + erase * np.outer(weight @ g, o)
        bottom = bottom + erase * np.outer(o, o)
    for text in kept:
        e = text.rows[text.last]
        top = top + preserve * np.outer(weight @ e, e)
        bottom = bottom + preserve * np.outer(e, e)
    return top @ np.linalg.inv(bottom)
