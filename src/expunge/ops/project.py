"""Projections of embeddings and weights: onto a span, off it, and off what predicts a label. All in float64."""

import torch
from jaxtyping import Float
from torch import Tensor


def basis(rows: Float[Tensor, "n d"], rtol: float = 1e-6) -> Float[Tensor, "k d"]:
    """Give an orthonormal basis of the rows' span.

    k counts singular values above rtol times the largest; no rows, or only zeros, give k = 0.
    """
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return right[values > rtol * values.max()] if len(values) and values.max() > 0 else right[:0]


def off(rows: Float[Tensor, "n d"], directions: Float[Tensor, "k d"]) -> Float[Tensor, "n d"]:
    """Remove orthonormal directions from rows: x - Q^T Q x.

    For a weight "out in" this is the projection of its input side: the edit off(delta, basis(retain)) leaves every
    retained row's output exactly as it was (null-space projection).
    """
    wide = rows.double()
    return wide - (wide @ directions.double().T) @ directions.double()


def leace(
    rows: Float[Tensor, "n d"], labels: Float[Tensor, "n k"], rtol: float = 1e-8
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d"]]:
    """Give the smallest affine change after which no linear probe predicts the labels from the rows.

    x -> x - P (x - mean) with P = S V V^T S^+, S the square root of the rows' covariance and V the orthonormal columns
    spanning S^+ Cov(x, label). Returns (P, mean). Then Cov(x', label) = 0 and E|x' - x|^2 is least among affine maps.
    Source: LEACE (arXiv:2306.03819, theorem 4.3).
    """
    x, z = rows.double(), labels.double()
    mean = x.mean(0)
    centred = x - mean
    cross = centred.T @ (z - z.mean(0)) / len(x)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    kept = values > rtol * values[-1]
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    white = (vectors / root) @ vectors.T
    colour = (vectors * root) @ vectors.T
    v = basis((white @ cross).T).T
    return colour @ v @ v.T @ white, mean
