"""TRCE, stage 1: closed-form edit of the closing token of sentences about the target (Chen et al., ICCV 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.fusion import window_gram
from expunge.ops.limits import at_least, naming
from expunge.ops.ridge import Gram
from expunge.ops.rows import encode_many
from expunge.ops.wording import Wording, columns, sentences
from expunge.patches.operator import SharedEdit
from expunge.patches.shared import Part, SharedPatch

Weighted = tuple[Tensor, Tensor, Tensor]
"""Keys "n d", goals "n d" and their gains "n"."""


@dataclass(frozen=True, kw_only=True)
class TRCE(Eraser):
    """Send the first closing token of sentences about the target to that of the same sentences about the anchor.

    W' = argmin (1/N) Σ_i Σ_e w_e ‖W' e − W g‖² + Σ_p λ_p ‖W' p − W p‖² + ridge · ‖W' − W‖²_F over N pairs of sentences,
    e a row of the i-th sentence about the target, g its goal in the same sentence about the anchor (without one, in the
    sentence with the target left out), p what is held. By default e is the first closing token alone, which in a causal
    text encoder has read the whole sentence: implicit wordings are to be caught where they end up, not at a keyword.
    All layers get W' = W M with one M of rank(M − I) ≤ N; c → M⁻¹ c undoes the edit wherever M is regular.
    This is stage 1 only. Stage 2, which trains early denoising steps, is not here: nothing measured with this file is
    the paper's method. Source: arXiv:2503.07389, whose abstract gives the idea; weights and equation are read off the
    authors' code. It has no ridge, but 600 000 captions to hold. SDXL's pooled text is not edited.
    """

    paper: ClassVar[str] = "arXiv:2503.07389"
    families: ClassVar[frozenset[Family]] = frozenset({"unet"})
    composes: ClassVar[bool] = True

    closing_weight: float = 1.0
    """w of the first closing token, sent to the anchor's sentence's. The code: 1."""

    word_weight: float = 0.0
    """w of each of the target's own words, sent to the last row of the anchor's sentence. The code: 0, off."""

    padding_weight: float = 0.0
    """w of the last row, times the number of rows behind the closing token; sent to the anchor's sentence's last. The
    code: 0, off."""

    opening_weight: float = 0.0
    """w of the opening token, which all sentences share and which so is only held. The code: 0, off."""

    closing: Literal["token", "words"] = "token"
    """Where the closing token is looked for. token: where it stands. words: the code's, one row after as many as the
    sentence has words, which is another row wherever a word takes several tokens."""

    templates: tuple[str, ...] = ("{}", "a picture of a {}", "a {} on a plain background", "a flat picture of a {}")
    """Sentences about target, anchor and retained concepts, ours. The code: 15."""

    prior: tuple[str, ...] = ("",)
    """Texts held as they are, all their rows. The code: captions of MS-COCO."""

    prior_weight: float = 1e-2
    """λ_p of each row of `prior`. The code: 0.01 or 0.02 over 30 000, of 600 000 captions."""

    preservation: Literal["once", "twice"] = "once"
    """How often prior_weight enters: twice, all λ_p times prior_weight once more, is the code's."""

    retain_weight: float = 1e-2
    """λ_p of each row of retained concepts. The code has none beside its captions."""

    ridge: float = 10.0
    """Weight of ‖W' − W‖²_F. The code: 0, as 600 000 captions span all directions."""

    @property
    def retains(self) -> bool:
        """Whether retained rows have any weight."""
        return self.retain_weight != 0

    def erase(self, model: Generator, request: Request, run: Run) -> SharedPatch:
        """Patch of one part, from the text alone: targets share the 1/N, so several are one operator."""
        if model.family not in self.families:
            raise InputError(f"trce reads a U-Net's closing tokens; {model.name!r} is {model.family!r}, legal: unet")
        at_least(self, dict.fromkeys(("closing_weight", "word_weight", "padding_weight", "opening_weight"), 0))
        at_least(self, {"prior_weight": 0, "retain_weight": 0, "ridge": 0})
        kept = sentences(self.templates, [prompt for concept in request.retain for prompt in concept.prompts])
        held = self.prior_weight * window_gram(model, self.prior)
        held = held + self.retain_weight * window_gram(model, [line.text for line in kept])
        with naming(request.target):
            edit = self._solve(model, request, held if self.preservation == "once" else held * self.prior_weight)
        targets = tuple(concept.name for concept in request.target)
        return SharedPatch.of([Part(targets=targets, edits={"tokens": edit})], model)

    def _solve(self, model: Generator, request: Request, held: Tensor) -> SharedEdit:
        """M = I + Σ w (g − e) eᵀ D⁻¹ / N, D = ridge I + Σ w e eᵀ / N + P, P the moment of what is held."""
        faced = [(line, to) for said, to in request.pairs for line in sentences(self.templates, [said])]
        pairs = [(line, line.about(to)) for line, to in faced]
        keys, goals, gain = self._rows(model, pairs)
        keys, goals, gain = keys.double(), goals.double(), gain / len(pairs)
        return SharedEdit(moves=gain[:, None] * (goals - keys), duals=Gram(keys, gain, self.ridge, held).solve(keys))

    def _rows(self, model: Generator, pairs: list[tuple[Wording, Wording]]) -> Weighted:
        """Rows of sentences about targets that have any weight, with their goals."""
        sides = [[wording.text for wording in side] for side in zip(*pairs, strict=True)]
        for text in (text for side in sides for text in side if text):
            model.check_prompt(text)
        old, new = (encode_many(model, texts) for texts in sides)
        ends, goals = (self._ends(cond, texts) for cond, texts in zip((old, new), sides, strict=True))
        row = torch.arange(len(pairs), device=ends.device)
        line, word = columns(model, [wording for wording, _ in pairs]).nonzero(as_tuple=True)
        behind = (old.tokens.shape[1] - old.mask.sum(1)).double()
        ones = torch.ones_like(behind)
        found = [
            (old.tokens[:, 0], new.tokens[:, 0], self.opening_weight * ones),
            (old.tokens[row, ends], new.tokens[row, goals], self.closing_weight * ones),
            (old.tokens[:, -1], new.tokens[:, -1], self.padding_weight * behind),
            (old.tokens[line, word], new.tokens[line, -1], self.word_weight * ones[line]),
        ]
        keys, goal, gain = (torch.cat(part) for part in zip(*found, strict=True))
        return keys[gain > 0], goal[gain > 0], gain[gain > 0]

    def _ends(self, cond: Condition, texts: list[str]) -> Int[Tensor, "b"]:
        if self.closing == "token":
            return cond.mask.sum(1) - 1
        counted = torch.tensor([len(text.split()) + 1 for text in texts], device=cond.mask.device)
        return counted.clamp(max=cond.mask.shape[1] - 1)
