"""Changed weights, stored as differences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.generator import Generator


@dataclass(frozen=True)
class WeightPatch:
    """A full-size difference for each changed tensor: W' = W + delta.

    Deltas are keyed by diffusers parameter path ("unet.….attn2.to_k.weight") and have the weight's shape. The sum is
    taken in float32 or wider and cast to the weight's dtype last.
    """

    kind: ClassVar[str] = "weights"

    deltas: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for path, delta in self.deltas.items():
            if not bool(torch.isfinite(delta).all()):
                raise InputError(f"the change of {path} is not finite; lower the step size or raise the ridge")

    def on(self, model: Generator) -> Generator:
        """Give a view with the deltas added to what `model` sees; raises InputError for a foreign path or shape."""
        return model.view(weights={path: added(model.weight(path), delta, path) for path, delta in self.deltas.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Give the deltas by path, contiguous."""
        return {path: delta.detach().contiguous() for path, delta in self.deltas.items()}

    def meta(self) -> dict[str, Any]:
        """Give nothing: the tensors say all."""
        return {}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "WeightPatch":
        """Rebuild from what `tensors` and `meta` gave."""
        return cls(dict(tensors))


def added(weight: Tensor, delta: Tensor, path: str) -> Tensor:
    """Add a delta to a weight in float32 or wider, then cast back; raises InputError if the shapes differ."""
    if weight.shape != delta.shape:
        raise InputError(f"{path} has shape {tuple(delta.shape)} in the patch but {tuple(weight.shape)} in the model")
    wide = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    return (weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype)
