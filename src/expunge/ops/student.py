"""Trainable copies of part of a model, seen through a view."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.generator import Generator, Group
from expunge.patches.lowrank import Factors, LowRankPatch, product
from expunge.patches.weights import WeightPatch, added


class Trainee(ABC):
    """Float32 masters that a training loop may move, and the model seen with them.

    The model they come from stays as it is. Bases may be stored in half precision: steps are taken on the masters, so
    small updates are not lost to rounding.
    """

    model: Generator

    @property
    @abstractmethod
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors an optimizer moves."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Give the current weights by path in the base's dtype, differentiable in `parameters`."""

    def view(self) -> Generator:
        """Give the model with the current weights in place."""
        return self.model.view(weights=self.weights())

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Put the current weights into the network's own slots for the duration of a backward pass.

        Gradient checkpointing runs forward again during backward. By then a functional view has taken its weights back,
        so the recomputation would see the base's. The slots are restored on exit, also after an error. Predictions of
        the base made inside would see the student: keep nothing but the backward pass here.
        """
        with torch.no_grad():
            loans = [(*_slot(self.model.network, path), tensor) for path, tensor in self.weights().items()]
        owned = [module._parameters[leaf] for module, leaf, _ in loans]
        try:
            for module, leaf, tensor in loans:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=True)
            yield
        finally:
            for (module, leaf, _), parameter in zip(loans, owned, strict=True):
                module._parameters[leaf] = parameter


class Student(Trainee):
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


class LowRankStudent(Trainee):
    """Trainable factors added to the matrices of a group: W + B A with B = 0 at the start.

    A has independent normal entries of variance 1 / fan-in. Vectors of the group (biases, norms) stay as they are.
    Source: LoRA (arXiv:2106.09685), section 4.1, scale 1.
    """

    def __init__(self, model: Generator, factors: Mapping[str, Factors]) -> None:
        self.model = model
        self._factors = dict(factors)

    @classmethod
    def of(cls, model: Generator, group: Group, *, rank: int, rng: torch.Generator) -> "LowRankStudent":
        """Start factors for every matrix and kernel of a group.

        The rank is cut to what a matrix allows. Raises InputError for rank < 1 or a group without matrices.
        """
        if rank < 1:
            raise InputError(f"rank is {rank}; legal: 1 and above")
        matrices = {path: weight for path, weight in _chosen(model, group).items() if weight.ndim >= 2}
        if not matrices:
            raise InputError(f"group {group!r} of {model.name!r} has no matrices to give a low-rank change")
        return cls(model, {path: _factors(weight, rank, rng) for path, weight in matrices.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the changed matrices."""
        return tuple(self._factors)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All factors, down before up, path by path."""
        return tuple(factor for pair in self._factors.values() for factor in pair)

    def weights(self) -> dict[str, Tensor]:
        """Give W + B A by path, in the base's dtype."""
        return {path: added(self.model.weight(path), product(*pair), path) for path, pair in self._factors.items()}

    @torch.no_grad()
    def patch(self) -> LowRankPatch:
        """Freeze what was learned as factors."""
        return LowRankPatch({path: (down.clone(), up.clone()) for path, (down, up) in self._factors.items()})


def _chosen(model: Generator, group: Group) -> dict[str, Tensor]:
    chosen = model.select(group)
    if not chosen:
        raise InputError(f"{model.name!r} of family {model.family!r} has no parameters in group {group!r}")
    return chosen


def _factors(weight: Tensor, rank: int, rng: torch.Generator) -> Factors:
    out, fan_in = weight.shape[0], weight[0].numel()
    size = min(rank, out, fan_in)
    down = torch.randn(size, *weight.shape[1:], generator=rng) / fan_in**0.5
    up = torch.zeros(out, size, *[1] * (weight.ndim - 2))
    return down.to(weight.device).requires_grad_(), up.to(weight.device).requires_grad_()


def _slot(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, leaf = path.rpartition(".")
    return network.get_submodule(module), leaf
