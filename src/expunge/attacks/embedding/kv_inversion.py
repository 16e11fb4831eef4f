"""Closed-form inversion of keys and values: embeddings that make edited text layers answer as the old ones did."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.attack import Access, Aim, Attack, Attempt, Threat
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.inversion import Sent, inverse_reading, reread, residual
from expunge.ops.limits import at_least


@dataclass(frozen=True, kw_only=True)
class KVInversion(Attack):
    """Send every embedding row of the prompt where the edited text-reading layers read the old keys and values again.

    A = argmin sum_l ||W'_l A - W_l||^2 + ridge s ||A||^2, one linear solve, no query: c' = A c. Exact for every edit
    W M with a regular M, as closed forms make; needs the unerased weights, and embeddings as input. U-Net: the keys and
    values of cross-attention.
    MMDiT: the context embedder and the pooled text's first layer; edits behind these it cannot undo.
    """

    paper: ClassVar[str] = "ours"
    access: ClassVar[Access] = "embedding"
    threat: ClassVar[Threat] = "T4"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    knows_original: ClassVar[bool] = True
    knows_defence: ClassVar[bool] = True

    ridge: float = 0.0
    """Pull of A towards nought, in units of the mean eigenvalue of sum_l W'_l^T W'_l; 0 is the pseudo-inverse."""

    negative: bool = True
    """Whether the rows of the negative (or empty) prompt are sent there too, as an attacker's pipeline can."""

    def __post_init__(self) -> None:
        at_least(self, {"ridge": 0})

    def search(self, model: Generator, aim: Aim, run: Run, *, reference: Generator) -> Iterator[Attempt]:
        """One attempt; facts: the share of the old outputs that is missed, for the plain prompts and for the sent ones.

        Raises InputError where the artifact left every text-reading layer as it was.
        """
        maps = self._maps(model, reference)
        cond = reference.encode(aim.prompts)
        identity = {route: torch.eye(len(back), dtype=back.dtype) for route, back in maps.items()}
        yield Attempt(
            model=self._sent(model, maps),
            prompts=aim.prompts,
            seeds=aim.seeds,
            step=1,
            learned=sum(back.numel() for back in maps.values()),
            facts={
                "residual": residual(reference, model, maps, cond),
                "residual_untouched": residual(reference, model, identity, cond),
            },
        )

    def random(
        self, model: Generator, aim: Aim, run: Run, *, reference: Generator, found: Attempt
    ) -> Iterator[Attempt]:
        """Send every row to I + R, R of random direction and as large as A - I."""
        maps = {route: _as_far(back, run, route) for route, back in self._maps(model, reference).items()}
        yield Attempt(model=self._sent(model, maps), prompts=aim.prompts, seeds=aim.seeds, step=1)

    def _sent(self, model: Generator, maps: dict[str, Float[Tensor, "_ _"]]) -> Generator:
        return reread(model, maps) if self.negative else model.view(guards=[Sent(maps)])

    def _maps(self, model: Generator, reference: Generator) -> dict[str, Float[Tensor, "_ _"]]:
        maps = inverse_reading(reference, model, self.ridge)
        if not maps:
            raise InputError(
                "attack 'kv_inversion' has nothing to invert: the artifact leaves every layer that reads the prompt "
                "alone as it was; legal: edits of such layers, or another attack"
            )
        return maps


def _as_far(back: Float[Tensor, "n n"], run: Run, route: str) -> Float[Tensor, "n n"]:
    identity = torch.eye(len(back), dtype=back.dtype)
    step = torch.randn(back.shape, generator=run.rng("random", route), dtype=back.dtype)
    return identity + step * (back - identity).norm() / step.norm()
