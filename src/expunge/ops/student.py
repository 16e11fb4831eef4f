"""Trainable parts of a model, seen through a view: whole tensors, or thin factors over frozen ones."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.generator import Generator, Group
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

    So the untrained student is the base, and its files are LoRA with alpha = rank (arXiv:2106.09685).
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
            if weight.ndim != 2:
                raise InputError(f"{path} has shape {tuple(weight.shape)}; low rank is for matrices")
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

    def weights(self) -> dict[str, Tensor]:
        """Give W + B A by path, summed in float32, in the base's dtype."""
        return {path: added(self.model.weight(path), product(*pair), path) for path, pair in self._factors.items()}

    @torch.no_grad()
    def patch(self) -> LowRankPatch:
        """Freeze what was learned; matrices whose B is still zero are left out."""
        moved = {path: pair for path, pair in self._factors.items() if bool(pair[1].any())}
        return LowRankPatch({path: (down.clone(), up.clone()) for path, (down, up) in moved.items()})


def _chosen(model: Generator, group: Group) -> dict[str, Tensor]:
    chosen = model.select(group)
    if not chosen:
        raise InputError(f"{model.name!r} of family {model.family!r} has no parameters in group {group!r}")
    return chosen


def _slot(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, leaf = path.rpartition(".")
    return network.get_submodule(module), leaf
