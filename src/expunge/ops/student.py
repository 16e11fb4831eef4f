"""Trainable parts of a model, seen through a view: whole tensors, or thin factors over frozen ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.generator import Generator, Group, Hook
from expunge.patches.lowrank import Factors, LowRankPatch, product
from expunge.patches.weights import WeightPatch, added


class Learner(ABC):
    """Float32 masters that a training loop may move, and the model seen with them.

    The model they come from stays as it is. Bases may be stored in half precision: steps are taken on the masters, so
    small updates are not lost to rounding.
    """

    model: Generator

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Paths of the tensors that change."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[Tensor, ...]:
        """The masters."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Give the current weights by path, in the base's dtype."""

    def restrict(self, masks: Sequence[Bool[Tensor, "..."]]) -> None:
        """Let only marked scalars move: from now on every gradient is multiplied by its mask before it is used.

        An optimizer without weight decay then leaves the others at their very bits. masks: in the order of
        `parameters`.
        """
        for master, mask in zip(self.parameters, masks, strict=True):
            master.register_hook(lambda grad, mask=mask: grad * mask)

    def view(self) -> Generator:
        """Give the model with the current weights in place."""
        return self.model.view(weights=self.weights())


class Student(Learner):
    """A full copy of a parameter group."""

    def __init__(self, model: Generator, masters: Mapping[str, Tensor]) -> None:
        self.model = model
        self._masters = dict(masters)

    @classmethod
    def of(cls, model: Generator, group: Group) -> "Student":
        """Copy a group; raises InputError if the family has no such parameters."""
        chosen = _chosen(model, group).items()
        return cls(
            model, {path: weight.detach().to(torch.float32, copy=True).requires_grad_() for path, weight in chosen}
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the copied tensors, in the order of `parameters`."""
        return tuple(self._masters)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The masters."""
        return tuple(self._masters.values())

    def weights(self) -> dict[str, Tensor]:
        """Give the masters by path, cast to the base's dtype."""
        return {path: master.to(self.model.weight(path).dtype) for path, master in self._masters.items()}

    @torch.no_grad()
    def patch(self) -> WeightPatch:
        """Freeze what was learned as differences from the base; tensors that did not move are left out."""
        deltas = {path: master - self.model.weight(path).float() for path, master in self._masters.items()}
        return WeightPatch({path: delta for path, delta in deltas.items() if bool(delta.any())})


class LowRankStudent(Learner):
    """Thin factors over frozen matrices: W' = W + B A, A "r in" drawn from N(0, 1/r²), B "out r" zero at the start.

    So the untrained student is the base, and its files are LoRA with alpha = rank (arXiv:2106.09685). Its view computes
    W x + B (A x), layer by layer: no B A of a matrix's size is ever made or kept for the backward pass.
    """

    def __init__(self, model: Generator, factors: Mapping[str, Factors]) -> None:
        self.model = model
        self._factors = dict(factors)

    @classmethod
    def of(cls, model: Generator, paths: Sequence[str], *, rank: int, rng: torch.Generator) -> "LowRankStudent":
        """Lay factors over the matrices at `paths`; raises InputError for rank < 1 and for what is no matrix."""
        if rank < 1:
            raise InputError(f"rank is {rank}; legal: 1 and above")
        factors = {}
        for path in paths:
            weight = model.weight(path)
            if not is_linear(model, path):
                raise InputError(f"{path} has shape {tuple(weight.shape)}; low rank is for matrices of linear maps")
            down = (torch.randn(rank, weight.shape[1], generator=rng) / rank).to(weight.device)
            up = torch.zeros(weight.shape[0], rank, device=weight.device)
            factors[path] = (down.requires_grad_(), up.requires_grad_())
        return cls(model, factors)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the matrices the factors lie over; each has two neighbours in `parameters`, A then B."""
        return tuple(self._factors)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The factors."""
        return tuple(factor for pair in self._factors.values() for factor in pair)

    def view(self) -> Generator:
        """Give the model with the factors beside its matrices; `weight` of this view still gives W."""
        hooks = [Hook(path.removesuffix(".weight"), _beside(*pair)) for path, pair in self._factors.items()]
        return self.model.view(hooks=hooks)

    def weights(self) -> dict[str, Tensor]:
        """Give W + B A by path, summed in float32, in the base's dtype."""
        return {path: added(self.model.weight(path), product(*pair), path) for path, pair in self._factors.items()}

    @torch.no_grad()
    def patch(self) -> LowRankPatch:
        """Freeze what was learned; matrices whose B is still zero are left out."""
        moved = {path: pair for path, pair in self._factors.items() if bool(pair[1].any())}
        return LowRankPatch({path: (down.clone(), up.clone()) for path, (down, up) in moved.items()})


def trainable(model: Generator, group: Group, *, rank: int, rng: torch.Generator) -> Student | LowRankStudent:
    """Copy a group whole, or for rank > 0 lay factors over the matrices of its linear maps and leave the rest frozen.

    Raises InputError for a family without the group, a group without such matrices, and a negative rank.
    """
    if rank < 0:
        raise InputError(f"rank is {rank}; legal: 0 for whole tensors, and above")
    if rank == 0:
        return Student.of(model, group)
    linear = [path for path in _chosen(model, group) if is_linear(model, path)]
    if not linear:
        raise InputError(f"group {group!r} of {model.name!r} has no matrix of a linear map; legal: rank 0")
    return LowRankStudent.of(model, linear, rank=rank, rng=rng)


def is_linear(model: Generator, path: str) -> bool:
    """Whether a tensor is the matrix of a linear map, over which factors can lie."""
    owner, _, name = path.rpartition(".")
    return name == "weight" and isinstance(model.network.get_submodule(owner), nn.Linear)


def _chosen(model: Generator, group: Group) -> dict[str, Tensor]:
    chosen = model.select(group)
    if not chosen:
        raise InputError(f"{model.name!r} of family {model.family!r} has no parameters in group {group!r}")
    return chosen


def _beside(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    """Add B (A x) to what a linear map says about x, in the precision of x."""

    def run(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        low = nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return output + low.to(output.dtype)

    return run
