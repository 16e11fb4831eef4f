"""Spending gradients during the backward pass gives an ordinary Adam's bits; a killed training goes on at its bits."""

import math

import pytest
import torch
from torch import Tensor

from expunge.core.eraser import Run
from expunge.models.load import load
from expunge.ops import descent as module
from expunge.ops.descent import Descent
from expunge.ops.fit import fit
from expunge.ops.student import Student

MODEL = load("tiny-unet")
SHAPES = ((6, 4), (6,), (3, 6), (3,), (2, 2))


def parameters() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).requires_grad_() for shape in SHAPES]


def loss(p: list[Tensor], step: int) -> Tensor:
    """A loss that does not reach the last parameter in odd steps."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    said = torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3]
    return said.square().mean() + (0 if step % 2 else p[4].sum())


@pytest.mark.parametrize("portion", [1, 100, 2**22])
def test_it_is_adam_bit_for_bit_whatever_the_portions(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORTION", portion)
    mine, theirs = parameters(), parameters()
    descent, adam = Descent(mine, lr=1e-2, clip=None), torch.optim.Adam(theirs, lr=1e-2, fused=True)
    for step in range(5):
        descent.begin(1e-2)
        loss(mine, step).backward()
        norm = descent.end()
        adam.zero_grad()
        loss(theirs, step).backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
        adam.step()
        torch.testing.assert_close(norm, expected)
        assert all(p.grad is None for p in mine)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    descent.close()
    loss(mine, 0).backward()
    assert all(p.grad is not None for p in mine)


def test_gradients_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORTION", 1)
    p, seen = parameters(), []
    descent = Descent(p, lr=1e-2, clip=None)
    for parameter in p:
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in p)))
    descent.begin(1e-2)
    loss(p, 0).backward()
    descent.end()
    assert len(seen) == len(p) and max(seen) <= 1


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_moves_nothing_it_reaches(
    clip: float | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTION", 1)
    monkeypatch.setattr(module, "_FUSED", ("cpu",) if fused else ())
    p = parameters()
    descent = Descent(p, lr=1e-2, clip=clip)

    def step(number: int, more: Tensor) -> float:
        descent.begin(1e-2)
        (loss(p, number) + more).backward()
        return descent.end().item()

    assert step(0, torch.zeros(())) > 0
    before = {name: tensor.clone() for name, tensor in descent.tensors().items()}
    value = (0 * p[1].sum()).sqrt()  # the root of 0 has no slope
    assert value.item() == 0 and math.isnan(step(2, value))
    after = descent.tensors()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.endswith(".1") for name in moved)
    assert bool(moved) == (clip is None)  # others have been spent by then, unless all wait for the norm
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert step(4, torch.zeros(())) > 0
    assert not torch.equal(before["parameter.1"], descent.tensors()["parameter.1"])


class Memory:
    """A place for unfinished trainings."""

    every = 3

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Tensor]] = {}

    def load(self, name: str) -> dict[str, Tensor]:
        return self.found.get(name, {})

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.found[name] = {key: tensor.clone() for key, tensor in tensors.items()}


class Killed(Exception):
    pass


def train(kept: Memory | None, dies_at: int = 99) -> tuple[list[Tensor], list[tuple[str, int, float]], Tensor]:
    own, total, rows = Student(MODEL, {str(i): p for i, p in enumerate(parameters())}), torch.zeros(()), []

    def told(step: int) -> Tensor:
        if step == dies_at:
            raise Killed
        value = loss(list(own.parameters), step)
        total.add_(value.detach())
        return value + 0.1 * total * own.parameters[0].sum()

    run = Run(kept=kept, log=lambda *row: rows.append(row))
    fit(own, told, run, steps=11, lr=(1e-2, 2e-2), state=(total,))
    return list(own.parameters), rows, total


@pytest.mark.parametrize("dies_at", [1, 3, 4, 10])
def test_killed_and_resumed_is_unbroken_bit_for_bit(dies_at: int) -> None:
    whole, rows, total = train(None)
    kept = Memory()
    with pytest.raises(Killed):
        train(kept, dies_at)
    again, later, other = train(kept)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)) and torch.equal(total, other)
    assert later == rows[2 * (dies_at // 3 * 3) :]
    finished, none, _ = train(kept)
    assert none == [] and all(torch.equal(a, b) for a, b in zip(whole, finished, strict=True))
