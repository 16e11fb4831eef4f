"""Two losses, one step: gradient projection between a wish and a constraint."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grads = tuple[Tensor, ...]


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product of two lists of tensors taken as one long vector, summed in float64."""
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]).sum()


def orthogonal(wish: Sequence[Tensor], guard: Sequence[Tensor]) -> Grads:
    """Gradient of the wish without its part along the guarded loss's, u − ⟨u, v⟩ / ‖v‖² · v; u itself where v = 0."""
    size = dot(guard, guard)
    if size == 0:
        return tuple(wish)
    scale = dot(wish, guard) / size
    return tuple((u.double() - scale * v.double()).to(u.dtype) for u, v in zip(wish, guard, strict=True))


def project_conflict(wish: Sequence[Tensor], guard: Sequence[Tensor]) -> Grads:
    """Gradient of the wish without its part that would undo the guarded loss.

    u − min(0, ⟨u, v⟩) / ‖v‖² · v, hence ⟨result, v⟩ ≥ 0; u itself where the two agree or v = 0.
    """
    return tuple(wish) if dot(wish, guard) >= 0 else orthogonal(wish, guard)


def surgical(
    wish: Tensor,
    guard: Tensor,
    parameters: Sequence[Tensor],
    weight: float,
    project: Callable[[Sequence[Tensor], Sequence[Tensor]], Grads] = project_conflict,
) -> Tensor:
    """Scalar with the value wish + weight · guard whose gradient is project(∇wish, ∇guard) + weight · ∇guard.

    Lets an ordinary training loop take a projected step. Costs one more backward pass than a sum.
    """
    v = _grads(guard, parameters)
    u = project(_grads(wish, parameters), v)
    step = tuple(a + weight * b for a, b in zip(u, v, strict=True))
    linear = torch.stack([(g * p).sum() for g, p in zip(step, parameters, strict=True)]).sum()
    return (wish + weight * guard).detach() + linear - linear.detach()


def _grads(loss: Tensor, parameters: Sequence[Tensor]) -> Grads:
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, materialize_grads=True)
