"""Theorems of the closed form, each with the case in which it must not hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.ops.ridge import Gram, output_gram, ridge_edit, shared_edit

F64 = torch.float64
CASE = st.tuples(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 30), st.floats(1e-3, 10.0))


def problem(seed, keys, retain, width=16, outs=(5, 20)):
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=F64)

    gain, hold = torch.rand(keys, generator=rng, dtype=F64) + 0.1, torch.rand(retain, generator=rng, dtype=F64) + 0.1
    weights = [randn(out, width) * 0.3 for out in outs]
    return weights, randn(keys, width), randn(keys, width), gain, randn(retain, width), hold


def normal_equation(old, new, k, g, gain, p, hold, ridge):
    """Gradient of the objective at `new`, divided by 2: zero exactly at the minimum."""
    erase = (gain[:, None] * (k @ new.T - g @ old.T)).T @ k
    keep = (hold[:, None] * (p @ (new - old).T)).T @ p
    return erase + keep + ridge * (new - old)


@settings(deadline=None)
@given(CASE)
def test_the_result_is_the_stationary_point(case):
    seed, keys, retain, ridge = case
    weights, k, g, gain, p, hold = problem(seed, keys, retain)
    edit = shared_edit(k, g, gain, p, hold, ridge)
    for old in weights:
        rest = normal_equation(old, old + edit.delta(old), k, g, gain, p, hold, ridge)
        start = normal_equation(old, old, k, g, gain, p, hold, ridge)
        assert rest.norm() <= 1e-10 * start.norm()
        assert start.norm() > 0


@settings(deadline=None)
@given(CASE)
def test_every_layer_is_multiplied_by_one_matrix_of_low_rank(case):
    seed, keys, retain, ridge = case
    weights, k, g, gain, p, hold = problem(seed, keys, retain)
    edit = shared_edit(k, g, gain, p, hold, ridge)
    m = edit.matrix()
    for old in weights:
        torch.testing.assert_close(old + edit.delta(old), old @ m, rtol=1e-9, atol=1e-11)
    assert torch.linalg.matrix_rank(m - torch.eye(16, dtype=F64)) <= keys


@settings(deadline=None)
@given(CASE)
def test_both_solvers_agree_with_the_plain_formula(case):
    """Woodbury (few rows) and Cholesky (many) against W' = N D^-1 written out with an explicit inverse."""
    seed, keys, retain, ridge = case
    weights, k, g, gain, p, hold = problem(seed, keys, retain)
    d = ridge * torch.eye(16, dtype=F64) + (gain[:, None] * k).T @ k + (hold[:, None] * p).T @ p
    n = ridge * torch.eye(16, dtype=F64) + (gain[:, None] * g).T @ k + (hold[:, None] * p).T @ p
    edit = shared_edit(k, g, gain, p, hold, ridge)
    for old in weights:
        torch.testing.assert_close(old + edit.delta(old), old @ n @ torch.linalg.inv(d), rtol=1e-7, atol=1e-9)


def test_both_solvers_are_reached():
    rows, gain = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), torch.ones(20)
    assert Gram(rows[:8], gain[:8], 0.1)._wood
    assert not Gram(rows[:9], gain[:9], 0.1)._wood


def test_ridge_edit_with_the_old_outputs_is_the_shared_edit():
    weights, k, g, gain, p, hold = problem(1, 4, 6)
    edit = shared_edit(k, g, gain, p, hold, 0.5)
    for old in weights:
        whole = ridge_edit(old, torch.cat([k, p]), torch.cat([g, p]) @ old.T, torch.cat([gain, hold]), 0.5)
        torch.testing.assert_close(whole, old + edit.delta(old), rtol=1e-10, atol=1e-12)


def test_nothing_moves_when_key_and_goal_agree_or_nothing_is_gained():
    weights, k, g, gain, p, hold = problem(2, 3, 5)
    for old in weights:
        assert torch.equal(shared_edit(k, k, gain, p, hold, 0.5).delta(old), torch.zeros_like(old))
        assert torch.equal(shared_edit(k, g, 0 * gain, p, hold, 0.5).delta(old), torch.zeros_like(old))
        assert shared_edit(k, g, gain, p, hold, 0.5).delta(old).norm() > 0


def test_a_growing_ridge_undoes_the_edit_at_its_own_rate():
    weights, k, g, gain, p, hold = problem(3, 3, 5)
    norms = [shared_edit(k, g, gain, p, hold, ridge).delta(weights[0]).norm() for ridge in (1e4, 1e5, 1e6)]
    assert norms[0] / norms[1] == pytest.approx(10, rel=0.05)
    assert norms[1] / norms[2] == pytest.approx(10, rel=0.05)


def test_a_small_ridge_reaches_the_goal_and_a_large_gain_holds_the_retained():
    weights, k, g, gain, p, hold = problem(4, 3, 5)
    old = weights[0]
    # Woodbury's rounding error grows as 1 / ridge, its bias as ridge: both stay below the bound here
    free = old + shared_edit(k, g, gain, p[:0], hold[:0], 1e-8).delta(old)
    torch.testing.assert_close(k @ free.T, g @ old.T, rtol=1e-6, atol=1e-6)
    held = old + shared_edit(k, g, gain, p, hold * 1e8, 1e-2).delta(old)
    torch.testing.assert_close(p @ held.T, p @ old.T, rtol=1e-5, atol=1e-6)
    assert (p @ (free - old).T).norm() > 1e-2


def test_order_and_splitting_do_not_matter():
    weights, k, g, gain, p, hold = problem(5, 4, 5)
    edit = shared_edit(k, g, gain, p, hold, 0.5)
    turn = torch.tensor([2, 0, 3, 1])
    shuffled = shared_edit(k[turn], g[turn], gain[turn], p.flip(0), hold.flip(0), 0.5)
    halves = shared_edit(k.repeat(2, 1), g.repeat(2, 1), gain.repeat(2) / 2, p.repeat(3, 1), hold.repeat(3) / 3, 0.5)
    for other in (shuffled, halves):
        torch.testing.assert_close(other.delta(weights[0]), edit.delta(weights[0]), rtol=1e-10, atol=1e-12)


def test_half_precision_rows_and_weights_are_solved_in_float64():
    weights, k, g, gain, p, hold = problem(6, 3, 5)
    edit = shared_edit(*(x.to(torch.float32) for x in (k, g, gain, p, hold)), 0.5)
    assert edit.delta(weights[0].half()).dtype == F64


def test_without_ridge_full_rank_rows_are_solved_and_others_refused():
    weights, k, g, gain, p, hold = problem(7, 3, 20)
    old = weights[0]
    new = old + shared_edit(k, g, gain, p, hold, 0.0).delta(old)
    assert normal_equation(old, new, k, g, gain, p, hold, 0.0).norm() < 1e-9
    with pytest.raises(InputError, match=r"singular: without ridge .* span 8 of 16 directions; legal: a ridge"):
        shared_edit(k, g, gain, p[:5], hold[:5], 0.0)


def test_the_edit_is_undone_by_the_inverse_on_embeddings():
    """A regular M is no robustness: c -> M^-1 c brings every key and value back."""
    weights, k, g, gain, p, hold = problem(8, 3, 5)
    m = shared_edit(k, g, gain, p, hold, 0.1).matrix()
    undone = torch.linalg.solve(m, k.T).T
    torch.testing.assert_close(undone @ (weights[0] @ m).T, k @ weights[0].T, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("gain", "ridge"), [(-1.0, 0.5), (1.0, -0.5)])
def test_negative_weights_are_refused(gain, ridge):
    with pytest.raises(InputError, match="must not be negative"):
        Gram(torch.ones(1, 4), torch.tensor([gain]), ridge)


def test_weights_that_are_not_finite_are_refused():
    whole = torch.eye(3)
    torch.testing.assert_close(output_gram([whole, 2 * whole]), 5 * torch.eye(3, dtype=torch.float64))
    with pytest.raises(InputError, match="not finite"):
        output_gram([whole, whole * float("inf")])


@pytest.mark.parametrize("ridge", [0.0, 0.5, 100.0])
def test_rows_summed_up_serve_as_well_as_rows(ridge):
    _, k, _, gain, p, _ = problem(3, 20, 5)
    moment = (gain[:, None] * k).T @ k
    torch.testing.assert_close(Gram.of(moment, ridge).solve(p), Gram(k, gain, ridge).solve(p), rtol=1e-8, atol=1e-10)
    mixed = Gram(k[:8], gain[:8], ridge, (gain[8:, None] * k[8:]).T @ k[8:])
    torch.testing.assert_close(mixed.solve(p), Gram(k, gain, ridge).solve(p), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(Gram.of(2 * moment, ridge).solve(p), Gram(k, gain, ridge).solve(p))
    with pytest.raises(InputError, match=r"ridge -1 and gains \(smallest none\) must not be negative"):
        Gram.of(moment, -1)


@pytest.mark.parametrize("keys", [1, 6, 12, 16, 40, 5000])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_applying_in_place_is_the_same_edit(keys, dtype):
    """Low rank, whole, and more keys than columns; `aligned` keeps one factor row a key and changes no result."""
    weights, k, g, gain, p, hold = problem(3, keys, 6)
    edit = shared_edit(k, g, gain, p, hold, 0.5)
    rows = shared_edit(k, g, gain, p, hold, 0.5, aligned=True)
    assert edit.moves.shape[0] == min(keys, 16) and rows.moves.shape[0] == keys
    for old in weights:
        expected = old + rows.delta(old)
        torch.testing.assert_close(old + edit.delta(old), expected, rtol=1e-9, atol=1e-11)
        new = old.to(dtype)
        edit.apply_([new])
        torch.testing.assert_close(new.to(F64), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_the_blocked_square_is_the_square():
    rng = torch.Generator().manual_seed(4)
    for width in (1, 3, 5, 16, 33):
        weights = [torch.randn(out, width, generator=rng) for out in (4, 7)]
        expected = sum(weight.double().T @ weight.double() for weight in weights)
        torch.testing.assert_close(output_gram(weights), expected, rtol=1e-12, atol=1e-12)
