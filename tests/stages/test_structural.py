"""What of a gated artifact is counted and compared bit for bit, and what takes its bound away."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from expunge.core.concept import Concept, Request
from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.leakage.twins import Twin
from expunge.methods.guard.gate import PromptGate
from expunge.models.load import load
from expunge.ops.reword import Reworded
from expunge.stages._arms import Plan
from expunge.stages._gate import structural

PLAN = Plan(model_sha256="", patch_sha256="", prompts_sha256="", steps=2, guidance_scale=3.0, seed=0, batch=2)
FORMS = ("a picture of a {}", "{} in ink", "one {}, blue", "a blue {}", "{} and house")
PAIRS = tuple(Twin(i, form.format("red cat"), form.format("dog")) for i, form in enumerate(FORMS))


def gated(name: str) -> Reworded:
    asked = Request(target=(Concept.of("red cat"),), anchor=(Concept.of("dog"),))
    found = PromptGate(others=("chair",), floor=1.0).erase(load(name), asked, Run()).on(load(name))
    assert isinstance(found, Reworded)
    return found


class PooledLeft(Reworded):
    """One text route left out: the pooled text is that of the prompt as it was written."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        return replace(super().encode(prompts), pooled=self.inner.encode(prompts).pooled)


class Drawn(Reworded):
    """A sampler that reads more than conditions: it draws the prompt as it was written."""

    def generate(self, prompts: Sequence[str], **settings: Any) -> torch.Tensor:
        return self.inner.generate(prompts, **settings)


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sdxl"])
def test_exact_substitution_is_seen_and_misses_are_counted(name: str) -> None:
    erased = gated(name)
    row = structural(erased, PAIRS, PLAN, Run())
    assert (row.kind, row.misses, row.n, row.bitwise_ok) == ("gate", 0, 5, True)
    assert row.I_hi == pytest.approx(1 - 0.05 ** (1 / 5))
    kitten = (*PAIRS[:4], Twin(4, "a red kitten", "a dog"))
    missed = structural(erased, kitten, PLAN, Run())
    assert (missed.misses, missed.bitwise_ok) == (1, True) and missed.I_hi > row.I_hi


@pytest.mark.parametrize("kind", [PooledLeft, Drawn])
def test_one_route_left_out_has_no_bound(kind: type[Reworded]) -> None:
    erased = gated("tiny-sdxl")
    row = structural(kind(erased.inner, erased.gate), PAIRS, PLAN, Run())
    assert (row.kind, row.misses, row.bitwise_ok, row.I_hi) == ("gate", 0, False, 1.0)


def test_without_a_gate_or_a_caught_prompt_there_is_none() -> None:
    base: Generator = load("tiny-unet")
    assert structural(base, PAIRS, PLAN, Run()).kind == "none"
    nothing = structural(gated("tiny-unet"), (Twin(0, "a kitten", "a dog"),), PLAN, Run())
    assert (nothing.misses, nothing.n, nothing.bitwise_ok, nothing.I_hi) == (1, 1, False, 1.0)


def test_conditions_are_equal_in_every_route_or_not_at_all() -> None:
    cond = load("tiny-sdxl").encode(["red cat"])
    assert cond.equals(load("tiny-sdxl").encode(["red cat"]))
    assert cond.pooled is not None
    changes = {
        "tokens": cond.tokens + 1e-7,
        "mask": ~cond.mask,
        "last": cond.last + 1,
        "pooled": torch.nextafter(cond.pooled, torch.tensor(9.0)),
        "extra": {},
        "bands": ((0, 1),),
    }
    for route, value in changes.items():
        assert not cond.equals(replace(cond, **{route: value})), route
    assert not cond.equals(replace(cond, pooled=None)) and not replace(cond, pooled=None).equals(cond)
    assert not cond.equals(replace(cond, tokens=cond.tokens.double()))
    key = next(iter(cond.extra))
    assert not cond.equals(replace(cond, extra={**cond.extra, key: cond.extra[key] + 1}))
