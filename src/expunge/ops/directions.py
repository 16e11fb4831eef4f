"""How much of given directions a prediction holds, over whole samples or place by place."""

import torch
from jaxtyping import Float
from torch import Tensor


def to_rows(pred: Float[Tensor, "b c h w"], local: bool) -> Float[Tensor, "g n"]:
    """Vectors that inner products are taken over: one per sample, or one per place, then over channels alone."""
    return pred.movedim(1, -1).reshape(-1, pred.shape[1]) if local else pred.flatten(1)


def from_rows(rows: Float[Tensor, "g n"], like: Float[Tensor, "b c h w"], local: bool) -> Float[Tensor, "b c h w"]:
    """Undo `to_rows`, in the shape and dtype of `like`."""
    b, c, h, w = like.shape
    back = rows.reshape(b, h, w, c).movedim(-1, 1) if local else rows.reshape(b, c, h, w)
    return back.to(like.dtype)


def coefficients(
    evidence: Float[Tensor, "g k n"], directions: Float[Tensor, "g k n"], floor: float
) -> Float[Tensor, "g k"]:
    """Share of every direction in its evidence, all directions fitted together.

    alpha = (D Dᵀ + floor · diag(‖r_k‖²))⁺ rho, rho_k = ⟨r_k, d_k⟩: with one direction ⟨r, d⟩ / (‖d‖² + floor · ‖r‖²),
    with one common r and floor 0 the least squares fit of r by the directions. Two equal directions share what one
    would get, a zero direction gets 0. floor is a pure number, so scaling r and d together changes nothing.
    """
    r, d = evidence.double(), directions.double()
    gram = d @ d.mT + torch.diag_embed(floor * r.square().sum(-1))
    inverse = torch.linalg.pinv(gram, rtol=1e-9, hermitian=True)
    return (inverse @ (r * d).sum(-1, keepdim=True)).squeeze(-1)


def cosines(left: Float[Tensor, "g k n"], right: Float[Tensor, "g k n"]) -> Float[Tensor, "g k"]:
    """Cosine of the angle between vectors, 0 where one of them vanishes."""
    a, b = left.double(), right.double()
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, (a * b).sum(-1) / size.where(size > 0, 1.0), 0.0).clamp(-1, 1)
