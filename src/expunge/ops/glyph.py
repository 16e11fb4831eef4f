"""A sign nobody ever drew, for the control that asks what an attack can teach a model which never knew it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

CELLS = 8
WORD = "glyph"
THRESHOLD = 0.5
"""Correlation from which a picture counts as showing the sign."""


def mark() -> Float[Tensor, "8 8"]:
    """The sign: 8 × 8 cells of 0 and 1, mirrored left to right, always the same."""
    half = torch.randint(0, 2, (CELLS, CELLS // 2), generator=torch.Generator().manual_seed(20261126)).float()
    return torch.cat([half, half.flip(1)], 1)


def glyphs(count: int, height: int, width: int, rng: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Pictures of the sign in dark ink on flat grounds of random light colours, over the middle half of each side."""
    ground = 0.6 + 0.4 * torch.rand(count, 3, 1, 1, generator=rng)
    ink = (1 - _stencil(height, width))[None, None] * ground + _stencil(height, width) * 0.1 * ground
    return ink.expand(count, 3, height, width).clamp(0, 1)


def likeness(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n"]:
    """Correlation of each picture's darkness with the sign, over the square where it stands; in [−1, 1], 0 if flat."""
    height, width = images.shape[2:]
    top, left = height // 4, width // 4
    window = (..., slice(top, top + height // 2), slice(left, left + width // 2))
    dark, sign = (1 - images.float().mean(1))[window].flatten(1), _stencil(height, width)[window].flatten()[None]
    dark, sign = (part - part.mean(1, keepdim=True) for part in (dark, sign))
    return (dark * sign).sum(1) / (dark.norm(dim=1) * sign.norm()).clamp(min=1e-6)


def shows_glyph(images: Float[Tensor, "n 3 h w"]) -> Bool[Tensor, "n"]:
    """Decide whether pictures show the sign: likeness ≥ 0.5. A matched filter: it knows this sign and place only."""
    return likeness(images) >= THRESHOLD


def _stencil(height: int, width: int) -> Float[Tensor, "h w"]:
    """The sign at a picture's size, 0 outside the middle half."""
    inner = interpolate(mark()[None, None], size=(height // 2, width // 2), mode="nearest")[0, 0]
    full = torch.zeros(height, width)
    full[height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = inner
    return full
