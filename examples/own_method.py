"""A method of your own: the target's word gives what the anchor's gave, for the canonical phrases alone.

examples/check_own_method.py holds it to the contract. In the library it would be one file of `methods/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Family, Generator
from expunge.patches.weights import WeightPatch


@dataclass(frozen=True, kw_only=True)
class Swap(Eraser):
    """Move every text-reading weight by one rank per target: W' - W = W (a - c) cᵀ / cᵀc, c and a the last words."""

    paper: ClassVar[str] = "arXiv:2308.14761"
    families: ClassVar[frozenset[Family]] = frozenset({"unet"})
    exempt: ClassVar[Mapping[str, str]] = {
        "moves_the_target_more_than_what_is_retained": "Nothing is held in place: all that resembles c moves along."
    }

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch:
        """Return one delta per layer; several targets add up."""
        deltas: dict[str, torch.Tensor] = {}
        for target, anchor in request.pairs:
            c, a = model.encode([target]).subject[0], model.encode([anchor]).subject[0]
            step = torch.outer(a - c, c) / c.dot(c)
            for site in model.sites("text_in"):
                deltas[site.path] = deltas.get(site.path, 0) + site.weight @ step
        return WeightPatch({path: delta.detach() for path, delta in deltas.items()})
