"""Contrast between features: what should look like what."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def reverse_contrast(
    feature: Float[Tensor, "b n"], near: Float[Tensor, "b n"], far: Float[Tensor, "b k n"], temperature: float
) -> Float[Tensor, "b"]:
    """How little a feature looks like unrelated ones, against how much like a related one.

    −log( Σ_k e^{s(f, far_k) / tau} / (e^{s(f, near) / tau} + Σ_k e^{s(f, far_k) / tau}) ), s the cosine. Lowering it
    pulls f towards the far features and off the near one: self-contrastive learning with the roles reversed
    (arXiv:2412.20413). Only f carries gradient.
    """
    one, others = (torch.nn.functional.normalize(x, dim=-1) for x in (feature, torch.cat([far, near[:, None]], 1)))
    logits = torch.einsum("bn,bkn->bk", one, others.detach()) / temperature
    return logits.logsumexp(1) - logits[:, :-1].logsumexp(1)


def near_contrast(
    feature: Float[Tensor, "b n"], near: Float[Tensor, "b n"], far: Float[Tensor, "b k n"], temperature: float
) -> Float[Tensor, "b"]:
    """How much a feature looks like a related one, as EraseAnything's released code measures it.

    log( e^{s(near, f) / tau} / (e^{s(near, f) / tau} + Σ_k e^{s(near, far_k) / tau}) ), s the cosine. Only f carries
    gradient: lowering it pushes f off the near feature, while the far ones are a constant that nothing is drawn to.
    """
    one, others = (torch.nn.functional.normalize(x, dim=-1) for x in (feature, torch.cat([far, near[:, None]], 1)))
    own = (one * others[:, -1].detach()).sum(1) / temperature
    rest = torch.einsum("bn,bkn->bk", others[:, -1], others[:, :-1]).detach() / temperature
    return own - torch.cat([own[:, None], rest], 1).logsumexp(1)


CONTRASTS: Mapping[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "both": reverse_contrast,
    "near": near_contrast,
}
"""By whether both the far and the near feature act, or the near one alone."""
