"""Trainable copies of part of a model, seen through a view."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.generator import Generator, Group
from expunge.patches.weights import WeightPatch


class Student:
    """A full copy of a parameter group: float32 masters that a training loop may move, and the model seen with them.

    The model they come from stays as it is. Bases may be stored in half precision: steps are taken on the masters, so
    small updates are not lost to rounding.
    """

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

    @torch.no_grad()
    def patch(self) -> WeightPatch:
        """Freeze what was learned as differences from the base; tensors that did not move are left out."""
        deltas = {path: master - self.model.weight(path).float() for path, master in self._masters.items()}
        return WeightPatch({path: delta for path, delta in deltas.items() if bool(delta.any())})


def _chosen(model: Generator, group: Group) -> dict[str, Tensor]:
    chosen = model.select(group)
    if not chosen:
        raise InputError(f"{model.name!r} of family {model.family!r} has no parameters in group {group!r}")
    return chosen


def _slot(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, leaf = path.rpartition(".")
    return network.get_submodule(module), leaf
