"""Changed weights as low-rank factors, in the names peft and diffusers read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.patches.weights import added

Factors = tuple[Float[Tensor, "r ..."], Float[Tensor, "out r ..."]]
"""Down and up: A "r in" and B "out r"; for a convolution A "r in kh kw" and B "out r 1 1"."""

# Endings of the two factors: ours and peft's first, then the older one of diffusers.
_ENDINGS = ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"))
_PEFT_ROOT = "base_model.model."


@dataclass(frozen=True)
class LowRankPatch:
    """Two thin factors for each changed matrix: W' = W + B A, any scale already inside B.

    Keyed by parameter path, "unet.….attn2.to_k.weight". Because alpha equals the rank, every consumer of the file
    reads the same change whether or not it knows of alpha.
    """

    kind: ClassVar[str] = "low_rank"

    factors: Mapping[str, Factors]

    def on(self, model: Generator) -> Generator:
        """Give a view with the products added to what `model` sees; raises InputError for a foreign path or shape."""
        weights = {path: added(model.weight(path), product(*pair), path) for path, pair in self.factors.items()}
        return model.view(weights=weights)

    def tensors(self) -> dict[str, Tensor]:
        """Give `<module>.lora_A.weight` and `<module>.lora_B.weight`, which peft and diffusers load as they are."""
        named = {}
        for path, (down, up) in self.factors.items():
            module = path.removesuffix(".weight")
            named[module + _ENDINGS[0][0]] = down.detach().contiguous()
            named[module + _ENDINGS[0][1]] = up.detach().contiguous()
        return named

    def meta(self) -> dict[str, Any]:
        """Give the rank of every path."""
        return {"rank": {path: down.shape[0] for path, (down, _) in self.factors.items()}}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "LowRankPatch":
        """Rebuild from what `tensors` gave; the ranks in `meta` are read off the factors again."""
        return cls.of_lora(tensors)

    @classmethod
    def of_lora(
        cls, tensors: Mapping[str, Tensor], *, root: str = "", alpha: Mapping[str, float] | float | None = None
    ) -> "LowRankPatch":
        """Read the LoRA tensors of peft or diffusers.

        root: component to put before names that lack it, "unet" for peft's own files. alpha: the scale's numerator, one
        for all or by module as the file names it; `<module>.alpha` tensors win; without either alpha = rank. Then
        B becomes (alpha / rank) B. Raises InputError for a name that is not part of a pair.
        """
        paths: dict[str, Factors] = {}
        for module, (down, up) in _pairs(tensors).items():
            given = alpha.get(module) if isinstance(alpha, Mapping) else alpha
            numerator = float(tensors[module + ".alpha"]) if module + ".alpha" in tensors else given
            scale = 1.0 if numerator is None else numerator / down.shape[0]
            name = module.removeprefix(_PEFT_ROOT)
            prefix = f"{root}." if root and not name.startswith(f"{root}.") else ""
            paths[f"{prefix}{name}.weight"] = (down, up if scale == 1.0 else up * scale)
        return cls(paths)


def product(down: Float[Tensor, "r ..."], up: Float[Tensor, "out r ..."]) -> Float[Tensor, "out ..."]:
    """Multiply the factors out to the weight's shape, B A, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(down.dtype, up.dtype), torch.float32)
    flat = up.to(wide).flatten(1) @ down.to(wide).flatten(1)
    return flat.reshape(up.shape[0], *down.shape[1:])


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    pairs: dict[str, Factors] = {}
    left = {name for name in tensors if not name.endswith(".alpha")}
    for down_end, up_end in _ENDINGS:
        for name in sorted(name for name in left if name.endswith(down_end)):
            module = name.removesuffix(down_end)
            if module + up_end not in left:
                raise InputError(f"LoRA tensor {name!r} has no partner {module + up_end!r}")
            pairs[module] = (tensors[name], tensors[module + up_end])
            left -= {name, module + up_end}
    if left:
        endings = ", ".join(end for pair in _ENDINGS for end in pair)
        raise InputError(f"{min(left)!r} is not a LoRA tensor; legal endings: {endings}, .alpha")
    return pairs
