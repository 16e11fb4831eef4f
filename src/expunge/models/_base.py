"""What all adapters share: one network, seen through views that never change it."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from expunge.core.errors import InputError, unknown
from expunge.core.generator import EditSite, Family, Group, Guard, Hook
from expunge.models._recompute import check_replayed, recomputing

View = TypeVar("View", bound="Adapter")


class Adapter(ABC):
    """A network, and the weights, guards and hooks a view lays over it.

    `network` is a module whose children are the pipeline's components under their diffusers names, so that every
    parameter path starts with its component. Its tensors are shared by all views, frozen, and never written to.
    """

    def __init__(self, name: str, family: Family, parts: Mapping[str, nn.Module]) -> None:
        self.name = name
        self.family = family
        self.network = nn.ModuleDict(dict(parts)).eval().requires_grad_(False)
        self.weights: Mapping[str, Tensor] = MappingProxyType({})
        self.guards: tuple[Guard, ...] = ()
        self.hooks: tuple[Hook, ...] = ()
        self.resting: frozenset[str] = frozenset()
        """Components that stay in the processor's memory and are on the network's device only while they run."""
        self._base = dict(self.network.named_parameters())
        self._blocks = recomputing(self.network)

    def view(
        self: View,
        *,
        weights: Mapping[str, Tensor] = MappingProxyType({}),
        guards: Sequence[Guard] = (),
        hooks: Sequence[Hook] = (),
    ) -> View:
        """Give a generator on the same network with replaced weights, added guards and added hooks; views stack.

        Later weights win over earlier ones; guards and hooks run in the order they were added. A replacement may be
        of another dtype than the network (fp32 masters over half precision): it is cast when used, differentiably.
        Raises InputError for a path the network does not have and for a wrong shape.
        """
        for path, tensor in weights.items():
            self._check_weight(path, tensor)
        for hook in hooks:
            self._module(hook.path)
        twin = copy.copy(self)
        twin.weights = MappingProxyType({**self.weights, **weights})
        twin.guards = (*self.guards, *guards)
        twin.hooks = (*self.hooks, *hooks)
        return twin

    def weight(self, path: str) -> Tensor:
        """Give one tensor by path, as this view sees it; an unknown path raises InputError."""
        self._check_weight(path)
        return self.weights.get(path, self._base[path])

    def parameters_by_path(self) -> dict[str, Tensor]:
        """Give every tensor of every component by its diffusers path, as this view sees it."""
        return {**self._base, **self.weights}

    def select(self, group: Group) -> dict[str, Tensor]:
        """Give the tensors of a parameter group by path, as this view sees them.

        Raises InputError for an unknown group and for one that matches nothing in this network.
        """
        paths = self._paths(group)
        if not paths:
            raise InputError(f"group {group!r} matches no parameter of model {self.name!r} (family {self.family})")
        return {path: self.weight(path) for path in paths}

    def call(
        self,
        path: str,
        args: tuple[Any, ...],
        named: Mapping[str, Any] = MappingProxyType({}),
        *,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Run a component or submodule with this view's weights and hooks; the network is left as it was.

        dtype: compute in another precision than the network's.
        """
        module, prefix = self._module(path), path + "."
        seen = {name: self.weights[name] for name in self.weights if name.startswith(prefix)}
        if dtype not in (None, next(module.parameters()).dtype):
            seen = {name: self.weight(name) for name in self._base if name.startswith(prefix)}
        swapped = {
            name.removeprefix(prefix): seen[name].to(self.device, dtype or self._base[name].dtype) for name in seen
        }
        if torch.is_grad_enabled() and (swapped or self.hooks):
            check_replayed(self._blocks, self.name)
        with self._hooked(), self._awake(path.partition(".")[0]):
            return functional_call(module, swapped, args, dict(named)) if swapped else module(*args, **named)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(iter(self._base.values())).device

    @abstractmethod
    def _paths(self, group: Group) -> list[str]:
        """Give the paths of the parameters in a group."""

    @contextmanager
    def _awake(self, part: str) -> Iterator[None]:
        if part not in self.resting:
            yield
            return
        module = self.network[part].to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        try:
            for hook in self.hooks:
                handles.append(self._module(hook.path).register_forward_hook(hook.run))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _module(self, path: str) -> nn.Module:
        try:
            return self.network.get_submodule(path)
        except AttributeError:
            raise InputError(f"model {self.name!r} has no module {path!r}; parts: {', '.join(self.network)}") from None

    def _check_weight(self, path: str, tensor: Tensor | None = None) -> None:
        base = self._base.get(path)
        if base is None:
            near = [name for name in self._base if name.rpartition(".")[2] == path.rpartition(".")[2]][:3]
            raise InputError(f"model {self.name!r} has no parameter {path!r}; it has, for example, {', '.join(near)}")
        if tensor is not None and tensor.shape != base.shape:
            raise InputError(
                f"parameter {path!r} of model {self.name!r} has shape {list(base.shape)}, not {list(tensor.shape)}"
            )


def linear_site(model: Adapter, path: str, role: Any, reads: Any) -> EditSite:
    """Describe one whole linear map that reads the prompt."""
    weight = model.weight(path)
    return EditSite(path=path, weight=weight, role=role, reads=reads, rows=(0, weight.shape[0]))


def check_group(group: str, legal: Sequence[str]) -> None:
    """Raise InputError for a group name the family does not know."""
    if group not in legal:
        raise unknown("parameter group", group, legal)
