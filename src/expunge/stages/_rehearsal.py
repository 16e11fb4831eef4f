"""A rehearsal: code runs on tensors without numbers (meta device), and what it would hold in memory is counted.

Shapes, dtypes and lifetimes are the real ones, because the real code runs. What it asks of numbers is answered for it:
a test is true, a float 1.0, a selection keeps everything, and a tensor equals itself alone. Small tensors stay real, so
that positions, masks and noise levels are what they will be. Attention is the fused kernel's, as on CPUs and GPUs: no
map of it is ever whole. What is freed in small blocks stays taken, as the C library has it.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

aten = torch.ops.aten

KINDS = ("weights", "trainable", "gradients", "optimizer", "rest")

LARGE = 32 * 2**20  # bytes; glibc gives larger blocks back at once, and keeps smaller ones for later
SMALL = 4096  # floats; larger ones have no numbers
SMALL_INDEX = 2**20  # integers and truth values


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes alive at one moment, by what they are for."""

    weights: int = 0
    """The base model, every part of it."""
    trainable: int = 0
    """What an optimizer moves."""
    gradients: int = 0
    """Of that."""
    optimizer: int = 0
    """Its moments."""
    rest: int = 0
    """Activations and everything else."""
    kept: int = 0
    """Freed before in blocks below LARGE, and not given back by the allocator."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.trainable + self.gradients + self.optimizer + self.rest + self.kept


class Rehearsal(TorchDispatchMode):
    """Keeps account of every storage on the meta device while it is active; `peak` is the fullest moment so far."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.guessed = False
        """Whether code asked for an integer, which may have become a size."""
        self.peak = Held()
        self._kinds: dict[int, tuple[str, int, int]] = {}
        self._live = dict.fromkeys(KINDS, 0)
        self._total = self._most = self._small = self._high = self._born = self._peak_born = 0
        for tensor in (*network.parameters(), *network.buffers()):
            self._count(tensor)
            self._mark(tensor, "weights")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Rehearse everything inside the block."""
        handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            with _Fused(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def restart(self) -> None:
        """Forget the peak so far and count on from what is held now."""
        self._most = 0
        self._note()

    @property
    def held(self) -> int:
        """Bytes alive now."""
        return self._total

    def beside(self, size: int, copies: int = 1) -> int:
        """Bytes taken, should some more blocks of one size be wanted now."""
        more = copies * size
        if size >= LARGE:
            return self._total - self._small + self._high + more
        return self._total - self._small + max(self._high, self._small + more)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        flat, spec = tree_flatten((args, dict(kwargs or {})))
        on_meta = any(isinstance(item, Tensor) and item.is_meta for item in flat)
        to_meta = any(isinstance(item, torch.device) and item.type == "meta" for item in flat)
        if not on_meta and not to_meta:
            return func(*args, **(kwargs or {}))
        if not on_meta:
            return self._made(func, flat, spec)
        if func in _ANSWERS:
            return self._counted(_ANSWERS[func](self, *args))
        if func in _BY_INDEX:
            args = (args[0], [place for index in args[1] for place in _positions(index)], *args[2:])
            flat, spec = tree_flatten((args, dict(kwargs or {})))
        again, named = tree_unflatten([_bare(item) for item in flat], spec)
        return self._counted(func(*again, **named))

    def _made(self, func: Any, flat: list[Any], spec: Any) -> Any:
        """What is new on the meta device: small tensors are made, or left, where they have numbers."""
        args, named = tree_unflatten(flat, spec)
        sample = next((item for item in flat if isinstance(item, Tensor)), None)
        sample = func(*args, **named) if sample is None else sample
        trained = any(isinstance(item, Tensor) and item.requires_grad for item in flat)
        if _stays_real(sample) and not trained:
            args, named = tree_unflatten([_real(item) for item in flat], spec)
            return func(*args, **named)
        return self._counted(func(*args, **named))

    def _counted(self, result: Any) -> Any:
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and item.is_meta:
                self._count(item)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._kinds:
            size, self._born = storage.nbytes(), self._born + 1
            self._kinds[key] = ("rest", size, self._born)
            self._live["rest"] += size
            self._total += size
            self._small += size if size < LARGE else 0
            self._high = max(self._high, self._small)
            weakref.finalize(storage, self._free, key).atexit = False
            self._note()

    def _free(self, key: int) -> None:
        kind, size, _ = self._kinds.pop(key)
        self._live[kind] -= size
        self._total -= size
        self._small -= size if size < LARGE else 0

    def _note(self) -> None:
        taken = self.beside(0)
        if taken > self._most:
            self._most, self._peak_born = taken, self._born
            self.peak = Held(**self._live, kept=self._high - self._small)

    def _mark(self, tensor: Tensor, kind: str) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._kinds:
            old, size, born = self._kinds[key]
            self._kinds[key] = (kind, size, born)
            self._live[old] -= size
            self._live[kind] += size
            if born <= self._peak_born and old != kind:  # it was there at the peak, and is now known for what it is
                peak = {name: getattr(self.peak, name) for name in (old, kind)}
                self.peak = replace(self.peak, **{old: peak[old] - size, kind: peak[kind] + size})

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        first = not optimizer.state
        for parameter in _parameters(optimizer):
            self._mark(parameter, "trainable")
            if parameter.grad is not None:
                self._mark(parameter.grad, "gradients")
            if first:
                parameter.register_post_accumulate_grad_hook(self._graded)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for item in tree_leaves(dict(optimizer.state)):
            if isinstance(item, Tensor) and item.is_meta:
                self._mark(item, "optimizer")

    def _graded(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._mark(parameter.grad, "gradients")


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _bare(item: Any) -> Any:
    """Bring what meets a tensor without numbers to the meta device."""
    if isinstance(item, torch.device):
        return torch.device("meta")
    return item.to("meta") if isinstance(item, Tensor) and not item.is_meta else item


def _stays_real(tensor: Tensor) -> bool:
    """Positions, masks and short vectors (levels, scales); never a matrix, which may be trained."""
    if tensor.is_floating_point():
        return tensor.ndim < 2 and tensor.numel() <= SMALL
    return tensor.numel() <= SMALL_INDEX


def _real(item: Any) -> Any:
    return torch.device("cpu") if isinstance(item, torch.device) else item


def _positions(index: Tensor | None) -> Sequence[Tensor | None]:
    """Turn a mask that has numbers into the positions it selects, axis by axis; one without selects all."""
    if index is None or index.dtype != torch.bool:
        return [index]
    mask = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
    return mask.nonzero().unbind(1)


def _scalar(rehearsal: Rehearsal, tensor: Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return True
    if tensor.is_floating_point():
        return 1.0
    rehearsal.guessed = True
    return 1


def _unique(rehearsal: Rehearsal, tensor: Tensor, dim: int, *flags: bool) -> tuple[Tensor, Tensor, Tensor]:
    n = tensor.shape[dim]
    return torch.empty_like(tensor), torch.arange(n), torch.ones(n, dtype=torch.long)


def _everywhere(rehearsal: Rehearsal, tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), tensor.ndim, dtype=torch.long, device="meta")


_ANSWERS: Mapping[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.unique_dim.default: _unique,
    aten.nonzero.default: _everywhere,
    aten.equal.default: lambda rehearsal, one, other: one is other,
}
_BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class _Fused(TorchFunctionMode):
    """Attention by the fused kernel's rule: saved are queries, keys, values, output and one number per query."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
