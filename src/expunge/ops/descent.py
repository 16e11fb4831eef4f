"""Adam that spends gradients while the backward pass still runs, so that they are never all in memory at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

PORTION = 2**24  # bytes of gradients spent together: fresh ones are still in the cache, and calls are few
_FUSED = ("cpu", "cuda", "mps")


class Descent:
    """Adam at a given step size, without weight decay: m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², θ ← θ − lr · m̂/√v̂.

    Source: arXiv:1412.6980, algorithm 1, β = 0.9, 0.999, ε = 1e-8. Every parameter is moved by itself, so the moment it
    is moved at changes no bit. clip: bound on the norm of all gradients together, which has to wait for the last one.
    """

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, clip: float | None) -> None:
        self.parameters, self.clip = list(parameters), clip
        fused = all(p.device.type in _FUSED for p in parameters)
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=fused)
        self._norms: list[Tensor] = []
        self._waiting = 0
        handles = [] if clip is not None else [p.register_post_accumulate_grad_hook(self._ready) for p in parameters]
        self._handles = handles

    def step(self, loss: Float[Tensor, ""], lr: float) -> Float[Tensor, ""]:
        """Take one step down a loss's gradient; gives the norm of all gradients together, before clipping."""
        self.optimizer.param_groups[0]["lr"] = lr
        self._norms, self._waiting = [], 0
        loss.backward()
        if self.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self._spend()
            return norm
        self._spend()
        return torch.stack(self._norms).norm() if self._norms else torch.zeros(())

    def close(self) -> None:
        """Leave the parameters as ordinary ones: gradients given to them later stay."""
        for handle in self._handles:
            handle.remove()

    def _ready(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms.append(torch.linalg.vector_norm(parameter.grad))
        self._waiting += parameter.grad.nbytes
        if self._waiting >= PORTION:
            self._spend()

    @torch.no_grad()
    def _spend(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._waiting = 0
