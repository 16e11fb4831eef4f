"""Prompt attacks on a toy behind the prompt gate: what it was told does not get past it, what it was not told does."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attacks.toy import AIM, Meaning, WordToy, base, shown
from expunge.attacks.prompt.negative_flip import NegativeFlip
from expunge.attacks.prompt.random_suffix import RandomSuffix
from expunge.core.attack import Attempt
from expunge.core.concept import Concept, Request
from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.methods.guard.gate import PromptGate
from expunge.ops.reword import Reworded

WIDTH = 8


class ReadToy(WordToy):
    """A WordToy whose prompts can be encoded: the pooled text is the sum of its words' random directions."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        pooled = torch.stack([torch.stack([direction(w) for w in text.split() or [""]]).sum(0) for text in prompts])
        n = len(prompts)
        return Condition(
            tokens=torch.zeros(n, 1, WIDTH),
            mask=torch.ones(n, 1, dtype=torch.bool),
            last=torch.zeros(n).long(),
            pooled=pooled,
        )


def direction(word: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def behind_a_gate(meaning: Meaning, *phrases: str) -> Reworded:
    """The toy behind a gate that was told these phrases, and whose encoder says nothing."""
    model: Generator = ReadToy(meaning)  # type: ignore[assignment]
    target = Concept(name=phrases[0], prompts=phrases)
    request = Request(target=(target,), anchor=(Concept.of("stone"),))
    gated = PromptGate(floor=1.0, others=("chair", "tree")).erase(model, request, Run()).on(model)
    assert isinstance(gated, Reworded)
    return gated


def twins(attempt: Attempt) -> Attempt:
    """The same attempt about the anchor."""

    def anchored(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text.replace("berry", "stone") for text in texts)

    negative = None if attempt.negative is None else anchored(attempt.negative)
    return replace(attempt, prompts=anchored(attempt.prompts), negative=negative)


def pictures(attempt: Attempt) -> Tensor:
    return attempt.model.generate(
        attempt.prompts, seeds=attempt.seeds, guidance_scale=4.0, steps=1, negative=attempt.negative
    )


@pytest.mark.parametrize(
    "attack, meaning",
    [(RandomSuffix(tries=3), base), (NegativeFlip(), lambda prompt: -base(prompt))],
    ids=["random_suffix", "negative_flip"],
)
def test_no_attack_gets_past_a_gate_that_was_told_the_name(
    attack: RandomSuffix | NegativeFlip, meaning: Meaning
) -> None:
    """Every picture is that of the twin, bit for bit; without the gate, or told another name, every prompt is won."""
    for gated, wins in ((behind_a_gate(meaning, "berry"), False), (behind_a_gate(meaning, "grape"), True)):
        attempts = list(attack.search(gated, AIM, Run(), reference=gated.inner))
        assert [shown(attempt) for attempt in attempts] == [[wins] * 3] * len(attempts)
        same = [torch.equal(pictures(attempt), pictures(twins(attempt))) for attempt in attempts]
        assert same == [not wins] * len(attempts)
        assert [shown(replace(attempt, model=gated.inner)) for attempt in attempts] == [[True] * 3] * len(attempts)
