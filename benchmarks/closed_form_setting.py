"""Shapes, stand-in texts and the clock of the closed-form benchmark."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

SD14 = (768, [320] * 10 + [640] * 10 + [1280] * 12)
"""Text width, and the output widths of the 32 key and value matrices that read it."""
SDXL = (2048, [640] * 20 + [1280] * 120)
WINDOW = 77
Shapes = tuple[int, Sequence[int]]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    ratio: float
    bar: str
    holds: bool
    n: int
    machine: str
    seconds: dict[str, float]
    """Medians behind the ratio."""
    error: dict[str, float]
    """Relative Frobenius errors against the reference, the worst layer's."""
    note: str = ""


def weights(shapes: Shapes, seed: int = 0) -> list[Tensor]:
    """Matrices of a model's sizes, entries N(0, 0.03²), float32."""
    rng = torch.Generator().manual_seed(seed)
    width, outs = shapes
    return [torch.randn(out, width, generator=rng) * 0.03 for out in outs]


def texts(count: int, width: int, seed: int = 1) -> Tensor:
    """Windows "count 77 width" of encoded texts in float32: one opening row for all, norm 27, a falling spectrum."""
    rng = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, width + 1) ** -0.5
    common, opening = torch.randn(width, generator=rng), torch.randn(width, generator=rng)
    rows = torch.randn(count, WINDOW, width, generator=rng) * fall + 0.05 * common
    rows[:, 0] = opening
    return rows * (27 / rows.norm(dim=-1, keepdim=True))


def medians(runs: dict[str, Callable[[], object]], n: int) -> dict[str, float]:
    """Median seconds of each, all in turn n times, after one run of each that is not the reference's as a warm-up.

    Each starts with other data in the caches: 256 MB are written in between.
    """
    other = torch.zeros(2**26)
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        if not name.startswith("reference"):
            run()
    for _ in range(n):
        for name, run in runs.items():
            other.add_(1)
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in spent.items()}


def peak_extra(run: Callable[[], object]) -> int:
    """Bytes by which a call raises this process's resident memory at its highest; Linux counts them."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative Frobenius error over layers."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def machine() -> str:
    """Processor, threads, memory and torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
