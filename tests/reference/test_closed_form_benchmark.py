"""The benchmark's reference at small shapes in float64: equal to the row-by-row loops and to the engine to 1e-10."""

import torch
from benchmarks import closed_form, closed_form_reference
from benchmarks.closed_form_reference import Scales
from benchmarks.closed_form_setting import texts, weights, worst
from uce_loops import Text, edit_2023, edit_2025

SHAPES = (24, [10, 20, 40])
SCALES = Scales(lam=0.5, erase=1.0, preserve=0.7)
OLD = [weight.double() for weight in weights(SHAPES)]
ROWS = texts(6, 24).double()


def test_2025_equals_loops_and_engine() -> None:
    pairs, kept = [(ROWS[0, 3], ROWS[1, 2]), (ROWS[2, 3], ROWS[3, 1])], [ROWS[4, 5]]
    found = closed_form_reference.uce_2025(OLD, pairs, kept, SCALES)
    both = [(Text(a[None].numpy(), 0), Text(b[None].numpy(), 0)) for a, b in pairs]
    held = [Text(row[None].numpy(), 0) for row in kept]
    loops = [edit_2025(w.numpy(), both, held, lam=0.5, erase=1.0, preserve=0.7) for w in OLD]
    assert worst(found, [torch.from_numpy(w) for w in loops]) < 1e-10
    assert worst(closed_form.applied(OLD, closed_form.uce(pairs, kept, SCALES)), found) < 1e-10
    assert worst(closed_form.applied(OLD, closed_form.uce(pairs, [], SCALES)), found) > 1e-6


def test_2023_equals_loops_and_engine() -> None:
    pairs, kept = [(ROWS[0, 2:], ROWS[1, 2:])], list(ROWS[3:])
    found = closed_form_reference.uce_2023(OLD, pairs, kept, SCALES)
    both = [(Text(a.numpy(), 0), Text(b.numpy(), 0)) for a, b in pairs]
    held = [Text(rows.numpy(), 0) for rows in kept]
    loops = [edit_2023(w.numpy(), both, held, lam=0.5, erase=1.0, preserve=0.7, technique="replace") for w in OLD]
    assert worst(found, [torch.from_numpy(w) for w in loops]) < 1e-10
    quick = closed_form_reference.uce_2023(OLD, pairs, kept, SCALES, [1], closed_form_reference.product)
    assert worst(quick, found[1:2]) < 1e-12
    assert worst(closed_form.applied(OLD, closed_form.uce(pairs, kept, SCALES)), found) < 1e-10


def test_rece_equals_engine() -> None:
    pairs, kept = [(ROWS[0], ROWS[1]), (ROWS[2], ROWS[1])], [ROWS[3]]
    begin = closed_form.uce(pairs, kept, SCALES)
    now = closed_form.applied(OLD, begin)
    found = closed_form_reference.rece(OLD, now, pairs, kept, SCALES, penalty=0.1, epochs=3)
    mine = closed_form.rece(OLD, begin, pairs, kept, SCALES, penalty=0.1, epochs=3)
    assert worst(closed_form.applied(OLD, mine), found) < 1e-10
    short = closed_form.rece(OLD, begin, pairs, kept, SCALES, penalty=0.1, epochs=2)
    assert worst(closed_form.applied(OLD, short), found) > 1e-6
