"""The path row of a leakage certificate: both arms walked by a sampler with noise in every step, means compared."""

from collections.abc import Sequence

import numpy as np

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.leakage.path import PathBound, path_divergence
from expunge.leakage.record import PathRow
from expunge.leakage.twins import Twin, draw_seed
from expunge.models._diffusion import Diffusion
from expunge.models.unet import UNetGenerator
from expunge.stages._arms import Plan


def walkable(model: Generator) -> UNetGenerator:
    """Give a U-Net, or a view of one; raises InputError for other families, whose samplers add no noise."""
    if not isinstance(model, UNetGenerator):
        raise InputError(f"family {model.family!r} has no ancestral sampler, its steps add no noise; legal: 'unet'")
    return model


def path_row(erased: Diffusion, base: Diffusion, pairs: Sequence[Twin], plan: Plan, run: Run) -> PathRow:
    """Estimate the divergence of the arms' paths both ways, one path per pair and arm; the base walks the same seeds.

    A mean over these prompts and seeds: the gaps are unbounded, so it comes without an interval and in no verdict.
    """
    found, total = list[PathBound](), 2 * len(pairs)
    for number, model in enumerate((erased, base)):
        ways = list[float]()
        for arm in ("concept", "anchor"):
            ways.append(_divergence(model, arm, pairs, plan))
            run.progress("paths", (2 * number + len(ways)) * len(pairs), 2 * total)
        found.append(PathBound(*ways))
    bound, whole = found[0], found[1].kl10 + found[1].kl01
    return PathRow(
        kl10=bound.kl10,
        kl01=bound.kl01,
        I_hi=bound.most_bits,
        vacuous=bound.vacuous,
        base_ratio=(bound.kl10 + bound.kl01) / whole if whole else None,
    )


def _divergence(model: Diffusion, arm: str, pairs: Sequence[Twin], plan: Plan) -> float:
    """KL in nats of an arm's path from the other's, along the arm's own paths."""
    rows, noise = list[np.ndarray](), np.zeros(0)
    for start in range(0, len(pairs), plan.batch):
        part = pairs[start : start + plan.batch]
        sides = [twin.concept for twin in part], [twin.anchor for twin in part]
        here, there = sides if arm == "concept" else sides[::-1]
        seeds = [draw_seed(plan.seed, f"path {arm}", twin.pair) for twin in part]
        gaps, spread = model.path_gaps(here, there, seeds=seeds, guidance_scale=plan.guidance_scale, steps=plan.steps)
        rows.append(gaps.numpy())
        noise = spread.numpy()
    return path_divergence(np.concatenate(rows), noise)
