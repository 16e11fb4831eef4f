"""The two distances against independent formulas, their intervals, and their refusals."""

import inspect

import numpy as np
import pytest
import scipy.linalg
import torch

from expunge.core.errors import InputError
from expunge.core.measure import Samples
from expunge.core.records import Case
from expunge.core.registry import catalogue, find
from expunge.metrics.frechet import FrechetDistance, frechet_distance
from expunge.metrics.kernel_distance import KernelDistance, kernel_distance


class MeanColours:
    """A real, small extractor: colour means and contrasts of the four quarters of an image."""

    name = "mean-colours-4"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        quarters = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return torch.cat([quarters, images.flatten(2).std(-1)], dim=1)


def samples(seed: int, shift: float = 0.0, prompts: int = 10, each: int = 4) -> Samples:
    rng = torch.Generator().manual_seed(seed)
    n = prompts * each
    tint = torch.rand(n, 3, 1, 1, generator=rng)
    images = (0.5 * tint + 0.3 * torch.rand(n, 3, 8, 8, generator=rng) + shift).clamp(0, 1)
    cases = tuple(
        Case(
            case_id=f"c{i}", target="t", role="retain", concept="r", style="", background="",
            prompt=f"prompt {i % prompts}", seed=i,
        )
        for i in range(n)
    )  # fmt: skip
    return Samples(images, cases)


def gaussians(n: int, m: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=rng, dtype=torch.float64)
    one = torch.randn(n, d, generator=rng, dtype=torch.float64) @ mix
    return one, torch.randn(m, d, generator=rng, dtype=torch.float64) * 2 + 1


def frechet_by_matrix_root(one: np.ndarray, two: np.ndarray) -> float:
    c1, c2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(root)))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 200, 6), (50, 80, 12), (300, 40, 3)])
def test_frechet_equals_the_textbook_formula_with_a_matrix_root(n: int, m: int, d: int) -> None:
    one, two = gaussians(n, m, d)
    expected = frechet_by_matrix_root(one.numpy(), two.numpy())
    assert expected > 1
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_fewer_images_than_features_is_finite_and_agrees_with_symmetric_roots() -> None:
    one, two = gaussians(10, 12, 30)
    values, vectors = np.linalg.eigh(np.cov(one.numpy(), rowvar=False))
    half = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(half @ np.cov(two.numpy(), rowvar=False) @ half).clip(0)
    gap = ((one.mean(0) - two.mean(0)) ** 2).sum().item()
    traces = one.var(0).sum().item() + two.var(0).sum().item()
    assert frechet_distance(one, two) == pytest.approx(gap + traces - 2 * np.sqrt(inner).sum(), rel=1e-6)


def test_frechet_is_zero_for_equal_sets_and_symmetric_and_sees_a_pure_shift_exactly() -> None:
    one, two = gaussians(60, 60, 5)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one))
    assert frechet_distance(one, one + 3) == pytest.approx(5 * 9)


def test_kernel_distance_equals_the_double_sum() -> None:
    one, two = gaussians(12, 9, 4)

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 4 + 1) ** 3)

    n, m = len(one), len(two)
    xx = sum(k(one[i], one[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(two[i], two[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(x, y) for x in one for y in two) / (n * m)
    assert kernel_distance(one, two) == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


def test_kernel_distance_is_unbiased_and_frechet_is_not() -> None:
    """Two samples of one law: the kernel distance is centred on 0, the Fréchet distance stays above it."""
    kernel, frechet = [], []
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        one, two = (torch.randn(20, 4, generator=rng, dtype=torch.float64) for _ in range(2))
        kernel.append(kernel_distance(one, two))
        frechet.append(frechet_distance(one, two))
    error = np.std(kernel) / len(kernel) ** 0.5
    assert abs(np.mean(kernel)) < 3 * error
    assert min(frechet) > 0


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance])
def test_a_changed_arm_is_farther_than_a_reseeded_one_and_the_interval_says_so(metric: type) -> None:
    base = samples(0)
    moved = metric(extractor=MeanColours()).compute(samples(1, shift=0.2), base)
    same = metric(extractor=MeanColours()).compute(samples(1), base)
    assert moved.low > same.high
    assert (moved.n, moved.clusters, moved.detector) == (40, 10, "mean-colours-4")


def test_kernel_interval_covers_zero_for_two_halves_of_one_law() -> None:
    covered = 0
    for seed in range(40):
        found = KernelDistance(extractor=MeanColours()).compute(samples(2 * seed), samples(2 * seed + 1))
        covered += found.low <= 0 <= found.high
    assert covered >= 34


def test_unequal_cases_and_too_few_prompts_are_refused() -> None:
    base = samples(0)
    fewer = Samples(base.images[:-1], base.cases[:-1])
    with pytest.raises(InputError, match=r"different cases \(39 and 40\)"):
        FrechetDistance(extractor=MeanColours()).compute(fewer, base)
    tiny = samples(0, prompts=2)
    with pytest.raises(InputError, match="at least 3 distinct prompts"):
        KernelDistance(extractor=MeanColours()).compute(tiny, tiny)


def test_every_metric_of_the_catalogue_carries_its_extractors_name() -> None:
    """No number may be called FID or KID: those names belong to one extractor."""
    names = list(catalogue("metrics"))
    assert {"frechet", "kernel_distance"} <= set(names)
    for name in names:
        assert not {"fid", "kid"} & set(name.split("_"))
        metric = find("metrics", name)
        assert (inspect.getdoc(metric) or "").strip()
        found = metric(extractor=MeanColours()).compute(samples(1), samples(0))
        assert found.detector == "mean-colours-4"
