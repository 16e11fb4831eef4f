"""The benchmark's reference at small shapes in float64: equal to the row-by-row loops and to the engine to 1e-10."""

from collections.abc import Sequence

import torch
from benchmarks import closed_form, closed_form_reference
from benchmarks.closed_form_reference import Scales, Sentences
from benchmarks.closed_form_setting import peak_extra, texts, weights, worst
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


def test_the_engine_in_single_precision_is_as_good_as_its_reference_may_be() -> None:
    """Weights and rows in float32 against the reference in float64, at a real text's width and spectrum."""
    shapes = (192, [40, 80])
    old, rows, scales = weights(shapes), texts(12, shapes[0]), Scales(lam=0.5, erase=1.0, preserve=0.1)
    pairs, kept = [(rows[0, 2:], rows[1, 2:])], list(rows[3:])
    begin = closed_form.uce(pairs, kept, scales)
    wide = [(a.double(), b.double()) for a, b in pairs], [row.double() for row in kept]
    truth = closed_form_reference.uce_2023([w.double() for w in old], *wide, scales)
    assert 0 < worst(closed_form.applied(old, begin), truth) < closed_form.SINGLE
    plain = closed_form_reference.uce_2023(old, pairs, kept, scales)  # forms an inverse, in float32
    assert worst(plain, truth) > 3 * worst(closed_form.applied(old, begin), truth)


def test_mace_equals_its_normal_equations_and_the_engine() -> None:
    concepts = [closed_form.other(c, torch.Tensor.double) for c in closed_form.sentences(SHAPES, 3, 2)]
    prior, ridge = ROWS[0].T @ ROWS[0], 0.5
    found = closed_form_reference.mace(OLD, concepts, prior, ridge)
    for layer, (old, new) in enumerate(zip(OLD, found, strict=True)):
        only = [closed_form.other(c, torch.Tensor.double, [layer]) for c in concepts]
        middle = _refined(old, concepts, prior, ridge)
        rest = ridge * (new - middle) + (new - old) @ prior
        for concept in only:
            (down, up), rows = concept.factors[0], concept.old.flatten(0, 1)
            rest = rest + (new - middle - up @ down) @ rows.T @ rows
        assert rest.norm() < 1e-9 * (new @ prior).norm()
    mine = [weight.clone() for weight in OLD]
    closed_form.fused_into(mine, closed_form.mace(concepts, prior, ridge))
    assert worst(mine, found) < 1e-10
    short = [weight.clone() for weight in OLD]
    closed_form.fused_into(short, closed_form.mace(concepts[:2], prior, ridge))
    assert worst(short, found) > 1e-6


def _refined(old: torch.Tensor, concepts: Sequence[Sentences], prior: torch.Tensor, ridge: float) -> torch.Tensor:
    rows, goals = (torch.cat([getattr(c, side).flatten(0, 1) for c in concepts]) for side in ("old", "new"))
    eye = torch.eye(old.shape[1], dtype=old.dtype)
    right = ridge * old + old @ prior + (goals @ old.T).T @ rows
    return torch.linalg.solve(ridge * eye + prior + rows.T @ rows, right.T).T


def test_peak_memory_sees_what_is_allocated() -> None:
    assert peak_extra(lambda: torch.ones(2**27)) > 400e6  # more than a worker has lying idle in its heap
    assert peak_extra(lambda: None) < 20e6
