"""S-certificate: a gated artifact's misses on the drawn twins, and whether what it catches is replaced exactly."""

from collections.abc import Sequence

import torch

from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.leakage.record import Structural
from expunge.leakage.twins import Twin, draw_seed
from expunge.ops.reword import Reworded
from expunge.stages._arms import Plan

CHUNK = 32
PICTURES = 4
"""Caught pairs that are drawn as well, in case a sampler reads more than conditions; those are compared of all."""


@torch.no_grad()
def structural(erased: Generator, pairs: Sequence[Twin], plan: Plan, run: Run) -> Structural:
    """Count the twins a gate does not draw as one sentence, and compare the others bit for bit.

    A pair is missed where the sentences handed on for its two prompts differ: P(missed) bounds I(C; X). Conditions of
    all other pairs and pictures of some must be equal; else, and where nothing is caught, there is no bound. Kind
    "none" for models without a gate in front of their encoders.
    """
    if not isinstance(erased, Reworded):
        return Structural()
    caught = []
    for count, pair in enumerate(pairs, 1):
        if erased.twin(pair.concept) == erased.twin(pair.anchor):
            caught.append(pair)
        run.progress("ask the gate", count, len(pairs))
    exact = bool(caught) and _encoded_alike(erased, caught) and _drawn_alike(erased, caught[:PICTURES], plan)
    return Structural.of(len(pairs) - len(caught), len(pairs), exact)


def _encoded_alike(erased: Generator, caught: Sequence[Twin]) -> bool:
    parts = [caught[start : start + CHUNK] for start in range(0, len(caught), CHUNK)]
    return all(
        erased.encode([pair.concept for pair in part]).equals(erased.encode([pair.anchor for pair in part]))
        for part in parts
    )


def _drawn_alike(erased: Generator, caught: Sequence[Twin], plan: Plan) -> bool:
    """Draw both prompts of every pair with one seed, in batches of one make-up."""
    seeds = [draw_seed(plan.seed, "gate", pair.pair) for pair in caught]
    ours, theirs = (
        erased.generate(texts, seeds=seeds, guidance_scale=plan.guidance_scale, steps=plan.steps)
        for texts in ([pair.concept for pair in caught], [pair.anchor for pair in caught])
    )
    return torch.equal(ours, theirs)
