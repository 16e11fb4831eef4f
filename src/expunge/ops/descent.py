"""Adam that spends gradients while the backward pass still runs, so that they are never all in memory at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

PORTION = 2**22  # bytes of parameters moved together: their gradients are still in the cache, and calls are few
Average = Callable[[Sequence[Tensor]], None]
_FUSED = ("cpu", "cuda", "mps")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def alone(tensors: Sequence[Tensor]) -> None:
    """Average over the one process there is."""


class Descent:
    """Adam without weight decay: m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², θ ← θ − lr · m̂ / (√v̂ + ε).

    Source: arXiv:1412.6980, algorithm 1, β = 0.9, 0.999, ε = 1e-8. Every parameter is moved by itself, so the moment it
    is moved at changes no bit. clip: bound on the norm of all gradients together, which has to wait for the last one.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, lr: float, clip: float | None, average: Average = alone
    ) -> None:
        self.parameters, self.clip, self.average = list(parameters), clip, average
        self._portions = [_Portion(some, lr, average) for some in _portions(self.parameters)]
        if clip is None:
            for portion in self._portions:
                portion.watch()

    def begin(self, lr: float, passes: int = 1) -> None:
        """Expect so many backward passes, whose gradients add up; the last one spends them."""
        for portion in self._portions:
            portion.begin(lr, passes)

    def end(self) -> Float[Tensor, ""]:
        """Spend what is left after the last pass; gives the norm of all gradients together, before clipping.

        A gradient that is not finite moves neither parameter nor moment of its portion, and with a clip none at all;
        the norm says so.
        """
        if self.clip is not None:
            self.average([p.grad for p in self.parameters if p.grad is not None])
            norm = clip_grad_norm_(self.parameters, self.clip)
            if bool(norm.isfinite()):
                for portion in self._portions:
                    portion.optimizer.step()
            return norm
        for portion in self._portions:
            portion.spend()
        norms = [norm for portion in self._portions for norm in portion.norms]
        return torch.stack(norms).norm() if norms else torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        """Give parameters and moments by name: all that the next step depends on but for the loss."""
        found = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        for i, state in enumerate(self._states()):
            found |= {f"{name}.{i}": torch.as_tensor(value) for name, value in state.items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to where `tensors` was taken, bit for bit; parameters are changed in place."""
        for i, (parameter, state) in enumerate(zip(self.parameters, self._states(), strict=True)):
            parameter.copy_(tensors[f"parameter.{i}"])
            for name in _MOMENTS:
                if f"{name}.{i}" in tensors:
                    value = tensors[f"{name}.{i}"]
                    state[name] = value.clone() if name == "step" else value.to(parameter, copy=True)

    def close(self) -> None:
        """Leave the parameters as ordinary ones: gradients given to them later stay."""
        for portion in self._portions:
            portion.close()

    def _states(self) -> list[dict[str, Tensor]]:
        """Moments of every parameter, in order; empty before its first step."""
        own = {id(p): portion.optimizer for portion in self._portions for p in portion.parameters}
        return [own[id(p)].state[p] for p in self.parameters]


class _Portion:
    """Parameters that are moved as soon as all of them have their gradients, which are then dropped."""

    def __init__(self, parameters: list[Tensor], lr: float, average: Average) -> None:
        self.parameters, self.norms, self.average = parameters, list[Tensor](), average
        self.fused = all(p.device.type in _FUSED for p in parameters)
        self.optimizer = torch.optim.Adam(parameters, lr=lr, fused=self.fused)
        self._awaited = 0
        self._handles = list[torch.utils.hooks.RemovableHandle]()

    def watch(self) -> None:
        self._handles = [p.register_post_accumulate_grad_hook(self._ready) for p in self.parameters]

    def begin(self, lr: float, passes: int) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self._awaited = passes * len(self.parameters)
        self.norms = []

    @torch.no_grad()
    def spend(self) -> None:
        """Use the gradients that are there, if any: a loss need not reach every parameter."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if grads:
            self.average(grads)
            self.norms.append(get_total_norm(grads))
            self._step(self.norms[-1].isfinite())
            self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _step(self, finite: Bool[Tensor, ""]) -> None:
        """Move, unless a gradient is not finite."""
        if self.fused:  # its kernels look for themselves: no waiting for the device in the middle of a backward pass
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()

    def _ready(self, parameter: Tensor) -> None:
        self._awaited -= 1
        if self._awaited == 0:
            self.spend()


def _portions(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut parameters into neighbours of PORTION bytes or a little more: neighbours get their gradients together."""
    some, size = list[Tensor](), 0
    for parameter in parameters:
        some.append(parameter)
        size += parameter.nbytes
        if size >= PORTION:
            yield some
            some, size = [], 0
    if some:
        yield some
