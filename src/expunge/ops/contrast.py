"""Contrast between features: what should look like what."""

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
