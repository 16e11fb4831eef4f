import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.ops.project import basis, leace, off

seeds = st.integers(0, 10_000)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, st.integers(1, 6))
def test_a_basis_is_orthonormal_and_spans(seed, rank):
    rows = randn(seed, 9, rank) @ randn(seed + 1, rank, 12)
    found = basis(rows)
    assert found.shape == (rank, 12)
    torch.testing.assert_close(found @ found.T, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(rows @ found.T @ found, rows, rtol=1e-8, atol=1e-8)


def test_no_rows_and_zero_rows_span_nothing():
    assert basis(torch.zeros(0, 5)).shape == (0, 5)
    assert basis(torch.zeros(3, 5)).shape == (0, 5)


@given(seeds)
def test_what_is_taken_off_is_gone_and_the_rest_stays(seed):
    rows, directions = randn(seed, 4, 12), basis(randn(seed + 1, 3, 12))
    left = off(rows, directions)
    torch.testing.assert_close(left @ directions.T, torch.zeros(4, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(off(left, directions), left)
    torch.testing.assert_close(left + rows @ directions.T @ directions, rows)


@given(seeds)
def test_a_weight_edit_off_the_retained_span_leaves_retained_outputs(seed):
    delta, retain = randn(seed, 7, 12), randn(seed + 1, 4, 12)
    free = off(delta, basis(retain))
    assert (retain @ free.T).abs().max() < 1e-10
    assert (retain @ delta.T).abs().max() > 1e-2


def labelled(seed, n=400, d=10):
    labels = (randn(seed, n, 1) > 0).double()
    mix = randn(seed + 1, d, d)
    rows = randn(seed + 2, n, d) @ mix + labels @ randn(seed + 3, 1, d) * 2
    return rows, labels


def cross(rows, labels):
    return ((rows - rows.mean(0)).T @ (labels - labels.mean(0)) / len(rows)).abs().max()


def erased(rows, projection, mean):
    return rows - (rows - mean) @ projection.T


@settings(deadline=None)
@given(seeds)
def test_leace_leaves_no_covariance_with_the_label(seed):
    rows, labels = labelled(seed)
    projection, mean = leace(rows, labels)
    assert cross(rows, labels) > 1e-2
    assert cross(erased(rows, projection, mean), labels) < 1e-9
    torch.testing.assert_close(erased(rows, projection, mean).mean(0), rows.mean(0))
    torch.testing.assert_close(projection @ projection, projection, rtol=1e-6, atol=1e-8)
    assert torch.linalg.matrix_rank(projection, rtol=1e-8) == 1


@settings(deadline=None)
@given(seeds)
def test_leace_changes_less_than_the_orthogonal_projection(seed):
    rows, labels = labelled(seed)
    projection, mean = leace(rows, labels)
    direction = basis(((rows - mean).T @ (labels - labels.mean(0))).T)
    orthogonal = mean + off(rows - mean, direction)
    assert cross(orthogonal, labels) < 1e-9
    least, other = (erased(rows, projection, mean) - rows).square().sum(), (orthogonal - rows).square().sum()
    assert least <= other * (1 + 1e-9)
