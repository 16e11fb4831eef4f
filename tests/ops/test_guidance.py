import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.ops.guidance import guide

scales = st.floats(-20, 20)
seeds = st.integers(0, 10_000)


def pair(seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64), torch.randn(
        2, 3, 4, 4, generator=rng, dtype=torch.float64
    )


def test_ends_and_direction():
    base, toward = pair(0)
    assert torch.equal(guide(base, toward, 0.0), base)
    torch.testing.assert_close(guide(base, toward, 1.0), toward)
    torch.testing.assert_close(guide(base, toward, -1.0), 2 * base - toward)


@given(seeds, scales, st.floats(0.01, 0.99))
def test_it_commutes_with_changes_of_parameterization(seed, scale, alpha):
    """v = sqrt(a) eps - sqrt(1 - a) x0 and x0 = (x - sqrt(1 - a) eps) / sqrt(a), all at the same (x, t)."""
    u, c = pair(seed)
    x = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)

    def as_v(eps):
        return (eps - (1 - alpha) ** 0.5 * x) / alpha**0.5

    torch.testing.assert_close(as_v(guide(u, c, scale)), guide(as_v(u), as_v(c), scale), rtol=1e-9, atol=1e-9)


@given(seeds)
def test_the_other_convention_is_one_plus_the_strength(seed):
    """c - (s + 1) (c - u) of later scripts equals u - s (c - u) of the paper."""
    u, c = pair(seed)
    torch.testing.assert_close(guide(u, c, -2.0), guide(c, u, 3.0))
