"""Guidance: one affine combination, valid in every parameterization."""

from jaxtyping import Float
from torch import Tensor


def guide(base: Float[Tensor, "b ..."], toward: Float[Tensor, "b ..."], scale: float) -> Float[Tensor, "b ..."]:
    """Move a prediction along the line to another.

    base + scale * (toward - base): 0 gives base, 1 gives toward, a negative scale leads away. Affine with weights that
    sum to one, so it commutes with every change among eps, v, x0 and flow at fixed (x, t).
    Source: classifier-free guidance (arXiv:2207.12598, eq. 6) with w + 1 = scale.
    """
    return base + scale * (toward - base)
