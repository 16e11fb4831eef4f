"""Theorems of the projection no embedding undoes, each with the case in which it must not hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.ops.projection import heard_map, off_span, projection
from expunge.ops.ridge import shared_edit

F64 = torch.float64
WIDTH = 16
CASE = st.tuples(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 8), st.floats(1e-3, 10.0))


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(seed, moves, held, outs=(7, 20)):
    """Layers, target rows and the anchor rows they face (held as well), other held rows, rows that are not held."""
    weights = [0.3 * randn(seed + i, out, WIDTH) for i, out in enumerate(outs)]
    c, goal = randn(seed + 10, moves, WIDTH), randn(seed + 11, moves, WIDTH)
    return weights, c, goal, torch.cat([goal, randn(seed + 12, held, WIDTH)]), randn(seed + 13, 30, WIDTH)


def solved(weights, c, goal, held, other, *, cut=1e-9, ridge=0.1, through_room=False):
    heard = heard_map(weights)
    room = off_span(held, heard)
    return projection(c - goal, heard, room, other, cut=cut, ridge=ridge, through_room=through_room)


def best_answer(new, old, rows):
    """For every row c the least sum of squares that an e reaches in |W' e - W c|^2, and that e: plain least squares."""
    goals = torch.cat([w @ rows.T for w in old])
    stacked = torch.cat(list(new))
    found = torch.linalg.lstsq(stacked, goals, driver="gelsd", rcond=1e-12).solution
    return (stacked @ found - goals).square().sum(0), found.T


@pytest.mark.parametrize(("outs", "rank"), [((7, 20), 16), ((3, 5), 8)])
def test_what_all_layers_hear_is_one_map_of_full_rank(outs, rank):
    weights, *_ = problem(0, 1, 0, outs)
    heard, x = heard_map(weights), randn(99, 5, WIDTH)
    assert heard.shape == (rank, WIDTH)
    torch.testing.assert_close((x @ heard.T).square().sum(1), sum((x @ w.T).square().sum(1) for w in weights))
    assert torch.linalg.matrix_rank(heard) == rank


def test_the_room_is_all_that_held_rows_are_not_heard_in():
    weights, _, _, held, other = problem(1, 2, 4)
    heard = heard_map(weights)
    room = off_span(torch.cat([held, held[:1] + held[1:2], held[:2]]), heard)  # mixtures and copies take no room
    assert room.shape == (16, 16 - 6)
    torch.testing.assert_close(room.T @ room, torch.eye(10, dtype=F64))
    assert (held @ heard.T @ room).abs().max() < 1e-12
    assert (other @ heard.T @ room).norm(dim=1).min() > 1e-2
    assert off_span(randn(5, 16, WIDTH), heard).shape[1] == 0


@given(CASE)
def test_it_is_a_projection_that_keeps_what_is_held_and_forgets_the_moves(case):
    seed, moves, held, ridge = case
    weights, c, goal, kept, other = problem(seed, moves, held)
    found = solved(weights, c, goal, kept, other, ridge=ridge)
    p = found.edit.matrix()
    scale = float(p.abs().max())
    torch.testing.assert_close(p @ p, p, rtol=1e-8, atol=1e-8 * scale**2)
    assert float(p.trace()) == pytest.approx(WIDTH - moves, abs=1e-8 * scale)  # of a projection, its rank
    assert torch.linalg.matrix_rank(found.edit.delta(torch.eye(WIDTH, dtype=F64)), rtol=1e-8) == moves
    torch.testing.assert_close(kept @ p.T, kept, rtol=1e-8, atol=1e-8 * scale)
    torch.testing.assert_close(c @ p.T, goal, rtol=1e-8, atol=1e-8 * scale)  # P c = P c* = c*
    assert (other @ p.T - other).norm() > 1e-3


@given(CASE)
def test_the_floor_is_the_least_any_embedding_reaches(case):
    """Found by plain least squares on the stacked layers; a regular edit of the same rows has none."""
    seed, moves, held, ridge = case
    weights, c, goal, kept, other = problem(seed, moves, held)
    found = solved(weights, c, goal, kept, other, ridge=ridge)
    least, e = best_answer([w @ found.edit.matrix() for w in weights], weights, c)
    torch.testing.assert_close(least, found.floor(c), rtol=1e-6, atol=1e-9)
    assert least.sum() > 1e-6
    assert float(e.norm()) < 1e6
    regular = shared_edit(c, goal, torch.ones(len(c), dtype=F64), kept, torch.ones(len(kept), dtype=F64), 0.1)
    assert best_answer([w @ regular.matrix() for w in weights], weights, c)[0].max() < 1e-12


def test_neither_chance_nor_descent_gets_below_the_floor():
    weights, c, goal, kept, other = problem(3, 2, 4)
    found = solved(weights, c, goal, kept, other)
    new = torch.cat([w @ found.edit.matrix() for w in weights])
    goals, floor = c @ torch.cat(weights).T, found.floor(c)
    for size in (0.1, 1.0, 10.0):
        tries = size * randn(int(10 * size), 2000, 1, WIDTH) + c
        assert bool(((tries @ new.T - goals).square().sum(-1) > floor).all())
    e = c.clone().requires_grad_()
    descent = torch.optim.LBFGS(
        [e], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        descent.zero_grad()
        total = (e @ new.T - goals).square().sum()
        total.backward()
        return total

    start = float(loss().detach())
    descent.step(loss)
    reached = (e @ new.T - goals).square().sum(1).detach()
    assert bool((reached >= floor * (1 - 1e-9)).all())
    torch.testing.assert_close(reached, floor, rtol=1e-4, atol=0)  # it is attained, so nothing higher would be true
    assert start > 1.5 * float(floor.sum())


def test_what_is_held_has_no_floor():
    weights, c, goal, kept, other = problem(4, 2, 3)
    found = solved(weights, c, goal, kept, other)
    mixtures = randn(7, 5, len(kept)) @ kept
    assert found.floor(mixtures).max() < 1e-20
    assert found.floor(c).min() > 1e-3


def test_smaller_directions_than_the_cut_stay():
    weights, c, goal, kept, other = problem(5, 3, 2)
    heard = heard_map(weights)
    sizes = torch.linalg.svdvals((c - goal) @ heard.T @ off_span(kept, heard))
    for k, cut in enumerate([1.01 * sizes[0], (sizes[0] + sizes[1]) / 2, (sizes[1] + sizes[2]) / 2, 0.99 * sizes[2]]):
        p = solved(weights, c, goal, kept, other, cut=float(cut)).edit.matrix()
        assert float(p.trace()) == pytest.approx(WIDTH - k, abs=1e-9)
        sent = float((c @ p.T - goal @ p.T).norm())
        assert (sent < 1e-9) == (k == 3)


def test_a_larger_ridge_raises_the_floor_and_moves_other_rows_more():
    weights, c, goal, kept, _ = problem(6, 1, 4)
    other = randn(8, 30, WIDTH) * torch.logspace(0, -2, WIDTH, dtype=F64)  # as embeddings: few directions are loud
    heard = heard_map(weights)
    floors, moved = [], []
    for ridge in (1e-6, 1e-3, 1.0, 1e6):
        found = solved(weights, c, goal, kept, other, ridge=ridge)
        floors.append(float(found.floor(c).sum()))
        p = found.edit.matrix()
        moved.append(float(((other @ p.T - other) @ heard.T).square().sum()))
    assert floors == sorted(floors) and floors[-1] > 1.2 * floors[0]
    assert moved == sorted(moved) and moved[-1] > 1.2 * moved[0]
    # at the far end all is removed of the target that may be: its whole part outside the held rows' span
    whole = heard @ (c - goal)[0]
    held = (kept @ heard.T).T
    rest = whole - held @ torch.linalg.lstsq(held, whole[:, None]).solution[:, 0]
    assert floors[-1] == pytest.approx(float(rest.square().sum()), rel=1e-4)


def test_no_other_admissible_choice_spares_the_rows_better():
    weights, c, goal, kept, other = problem(7, 2, 4)
    heard, ridge = heard_map(weights), 0.1
    room, found = off_span(kept, heard), solved(weights, c, goal, kept, other, ridge=ridge)
    v = found.edit.duals @ torch.linalg.inv(heard)
    u = -found.edit.moves @ heard.T
    scale = (other @ heard.T).square().mean()

    def cost(v):
        return float((other @ heard.T @ v.T).square().sum(1).mean() / scale + ridge * v.square().sum())

    torch.testing.assert_close(v @ u.T, torch.eye(2, dtype=F64))
    inside = room @ torch.linalg.svd(u @ room).Vh[2:].T  # directions of the room that U does not see
    for seed in range(20):
        step = 0.01 * randn(seed, 2, inside.shape[1]) @ inside.T
        assert cost(v + step) > cost(v)
    assert cost(0.99 * v) < cost(v)  # without the constraint it would vanish


def test_through_the_room_nothing_grows_but_the_move_is_not_followed():
    weights, c, goal, kept, other = problem(8, 2, 4)
    heard = heard_map(weights)
    rows = torch.cat([other, c, 100 * randn(9, 50, WIDTH)])

    def growth(through):
        p = solved(weights, c, goal, kept, other, ridge=1e9, through_room=through).edit.matrix()
        sent = float((c @ p.T - goal).norm() / (c - goal).norm())
        return float(((rows @ p.T @ heard.T).norm(dim=1) / (rows @ heard.T).norm(dim=1)).max()), sent

    louder, sent = growth(True)
    assert louder <= 1 + 1e-6 and sent > 1e-2
    louder, sent = growth(False)
    assert louder > 1.01 and sent < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounded_weights_keep_out_embeddings_of_usual_length_only(dtype):
    """sqrt(sum) >= sqrt(floor) - |E| |e|; an embedding long enough to make the rounding speak gets below the floor."""
    weights, c, goal, kept, other = problem(9, 1, 4)
    found = solved(weights, c, goal, kept, other)
    exact = torch.cat([w @ found.edit.matrix() for w in weights])
    stored = exact.to(dtype).double()
    error = float(torch.linalg.matrix_norm(stored - exact, ord=2))
    goals, floor = c @ torch.cat(weights).T, float(found.floor(c).sum())

    def reach(penalty):
        below = torch.cat([stored, penalty**0.5 * torch.eye(WIDTH, dtype=F64)])
        sides = torch.cat([goals.T, torch.zeros(WIDTH, 1, dtype=F64)])
        e = torch.linalg.lstsq(below, sides, driver="gelsd", rcond=1e-15).solution.T
        return float((e @ stored.T - goals).norm()), float(e.norm())

    for penalty in (1.0, 1e-2, 1e-4):
        left, size = reach(penalty)
        assert left >= floor**0.5 - error * size
        assert left >= 0.99 * floor**0.5
    left, size = reach(0.0)
    assert left < 0.99 * floor**0.5
    assert size > floor**0.5 * 0.01 / error
