"""Closed-form inversion of edited layers that read the prompt: embeddings that give the old keys and values again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.generator import Generator
from expunge.ops.ridge import output_gram, sum_products
from expunge.patches.guard import PassGuard

# Below this share of the largest an eigenvalue of a Gram matrix is rounding of float32 weights.
CUT = 1e-10


def undoing(
    old: Sequence[Float[Tensor, "_ in"]], new: Sequence[Float[Tensor, "_ in"]], ridge: float = 0.0
) -> Float[Tensor, "in in"]:
    """Give the matrix that sends every old embedding to the one the edited layers read most nearly like it, in float64.

    A = argmin sum_l ||W'_l A - W_l||^2 + ridge s ||A||^2 = (ridge s I + S')^-1 sum_l W'_l^T W_l with
    S' = sum_l W'_l^T W'_l and s its mean eigenvalue. Without ridge the pseudo-inverse: directions that no layer reads
    any more (eigenvalue below 1e-10 of the largest) count as absent, and A is the shortest solution. For an edit W M
    with one regular M it is M^-1. Source: closed-form inversion of keys and values; ours.
    """
    gram = output_gram(new)
    values, vectors = torch.linalg.eigh(gram)
    if ridge > 0:
        values = values.clamp(min=0) + ridge * values.mean()
    kept = values > CUT * values[-1]
    half = vectors[:, kept] / values[kept].sqrt()
    return half @ (half.T @ sum_products(new, old))


def inverse_reading(base: Generator, erased: Generator, ridge: float = 0.0) -> dict[str, Float[Tensor, "_ _"]]:
    """Give `undoing` for each text route ("tokens", "pooled") whose text-reading layers differ; {} if none does."""
    old, new = (model.sites("text_in") for model in (base, erased))
    found: dict[str, Tensor] = {}
    for route in dict.fromkeys(site.reads for site in old):
        pairs = [(a.weight, b.weight) for a, b in zip(old, new, strict=True) if a.reads == route]
        if any(not torch.equal(a, b) for a, b in pairs):
            found[route] = undoing([a for a, _ in pairs], [b for _, b in pairs], ridge)
    return found


def reread(model: Generator, maps: Mapping[str, Float[Tensor, "_ _"]]) -> Generator:
    """Give the model as it answers embeddings sent to A e, the negative prompt's as well as the prompt's.

    Its text-reading layers become W A, which is the same to the network: nothing else reads these rows.
    """
    sites = [site for site in model.sites("text_in") if site.reads in maps]
    return model.view(
        weights={site.path: (site.weight.double() @ maps[site.reads]).to(site.weight.dtype) for site in sites}
    )


def residual(base: Generator, erased: Generator, maps: Mapping[str, Float[Tensor, "_ _"]], cond: Condition) -> float:
    """Give ||W' A c - W c|| / ||W c|| over all layers and rows of a condition, on the routes that `maps` names."""
    miss = size = 0.0
    sent = Sent(maps).condition(cond)
    for a, b in zip(base.sites("text_in"), erased.sites("text_in"), strict=True):
        if a.reads in maps:
            before, after = (_rows(side, a.reads).double() for side in (cond, sent))
            want = before @ a.weight.double().T
            miss += float((after @ b.weight.double().T - want).square().sum())
            size += float(want.square().sum())
    return (miss / size) ** 0.5 if size > 0 else 0.0


@dataclass(frozen=True)
class Sent(PassGuard):
    """Sends every embedding row e of a prompt to A e before the network reads it; negative prompts stay as they are."""

    maps: Mapping[str, Float[Tensor, "_ _"]]

    def condition(self, cond: Condition) -> Condition:
        """Replace the rows."""
        for route, back in self.maps.items():
            rows = (_rows(cond, route).double() @ back.T).to(cond.tokens.dtype)
            cond = replace(cond, tokens=rows) if route == "tokens" else replace(cond, pooled=rows)
        return cond


def _rows(cond: Condition, route: str) -> Tensor:
    rows = cond.tokens if route == "tokens" else cond.pooled
    assert rows is not None, "a layer reads pooled text that this model does not encode"
    return rows
