"""Which export formats there are, and which of them an artifact can be written in."""

from expunge.core.card import Card
from expunge.core.errors import InputError, unknown
from expunge.patches.guard import GuardPatch

FACTORED = ("lora", "kohya")
ADAPTERS = (*FACTORED, "comfy-diff")
FILES = (*ADAPTERS, "merged")
FORMATS = (*FILES, "pipeline")


def is_guard(card: Card) -> bool:
    """Whether an artifact is code and its tensors, not weights."""
    return card.patch.kind == GuardPatch.kind


def legal(card: Card) -> tuple[str, ...]:
    """Formats an artifact can be written in: a guard cannot be merged, and kohya names the layers of U-Nets."""
    formats = ADAPTERS if is_guard(card) else FORMATS
    return tuple(to for to in formats if to != "kohya" or card.base.family == "unet")


def check_words(to: str, rank: int | None) -> None:
    """Raise InputError for an unknown format and for a rank below 1."""
    if to not in FORMATS:
        raise unknown("export format", to, FORMATS)
    if rank is not None and rank < 1:
        raise InputError(f"rank {rank} keeps nothing; legal: 1 or more")


def check_fits(card: Card, to: str, rank: int | None) -> None:
    """Raise InputError for a format the artifact cannot be written in, naming those it can, or for an idle rank."""
    others = ", ".join(legal(card))
    if to == "kohya" and to not in legal(card):
        raise InputError(
            f"format 'kohya' names the layers of U-Nets (SD 1.x, 2.x, SDXL), {card.base.name!r} is of family "
            f"{card.base.family!r}; legal: {others} (ComfyUI reads lora for transformers)"
        )
    if to not in legal(card):
        raise InputError(
            f"{card.method} made a guard, which is code and cannot be merged into weights; legal: {others}"
        )
    if rank is not None and is_guard(card):
        raise InputError(
            f"{card.method} made a guard, whose tensors are written as they are, got rank {rank}; give none"
        )
    if rank is not None and to not in FACTORED:
        ranked = ", ".join(name for name in FACTORED if name in legal(card))
        raise InputError(f"format {to!r} has no rank, got {rank}; legal with a rank: {ranked}")
