import pytest
import torch

from expunge.ops.directions import coefficients, cosines, from_rows, to_rows


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("local", [False, True])
def test_rows_come_back_and_places_keep_their_channels(local):
    pred = drawn(2, 3, 4, 5)
    rows = to_rows(pred, local)
    assert rows.shape == ((40, 3) if local else (2, 60))
    assert torch.equal(from_rows(rows, pred, local), pred)
    if local:
        assert torch.equal(rows[7], pred[0, :, 1, 2])


def test_one_direction_is_the_quotient_of_inner_products():
    r, d = drawn(4, 1, 9), drawn(4, 1, 9, seed=1)
    ratio = (r * d).sum(-1) / d.square().sum(-1)
    torch.testing.assert_close(coefficients(r, d, 0.0), ratio)
    held = (r * d).sum(-1) / (d.square().sum(-1) + 0.5 * r.square().sum(-1))
    torch.testing.assert_close(coefficients(r, d, 0.5), held)
    assert (held - ratio).abs().max() > 1e-3


def test_scaling_both_changes_nothing_and_scaling_the_direction_divides():
    r, d = drawn(4, 2, 9), drawn(4, 2, 9, seed=1)
    torch.testing.assert_close(coefficients(7 * r, 7 * d, 1e-3), coefficients(r, d, 1e-3))
    torch.testing.assert_close(coefficients(-r, -d, 1e-3), coefficients(r, d, 1e-3))
    torch.testing.assert_close(coefficients(r, 4 * d, 0.0), coefficients(r, d, 0.0) / 4)


def test_many_directions_are_the_least_squares_fit():
    r, d = drawn(3, 9), drawn(3, 2, 9, seed=1)
    fitted = torch.linalg.lstsq(d.mT, r[..., None]).solution[..., 0]
    torch.testing.assert_close(coefficients(r[:, None].expand(3, 2, 9), d, 0.0), fitted)
    alone = torch.cat([coefficients(r[:, None], d[:, k : k + 1], 0.0) for k in range(2)], 1)
    assert (alone - fitted).abs().max() > 1e-2


def test_equal_directions_share_and_a_zero_one_gets_nothing():
    r, d = drawn(3, 1, 9), drawn(3, 1, 9, seed=1)
    one = coefficients(r, d, 0.0)
    twice = coefficients(r.expand(3, 2, 9), d.expand(3, 2, 9), 0.0)
    torch.testing.assert_close(twice, one.expand(3, 2) / 2)
    nothing = coefficients(r, torch.zeros_like(d), 0.0)
    assert torch.equal(nothing, torch.zeros(3, 1, dtype=torch.float64))
    assert torch.equal(coefficients(0 * r, 0 * d, 1e-6), torch.zeros(3, 1, dtype=torch.float64))


def test_cosines_know_parallel_orthogonal_and_nothing():
    a = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]])
    b = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]], [[-1.0, 0.0]], [[1.0, 0.0]]])
    assert torch.equal(cosines(a, b)[:, 0], torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64))
