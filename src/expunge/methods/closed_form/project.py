"""Projection: closed-form erasure with a floor that no embedding gets below. Our own method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.limits import naming
from expunge.ops.projection import Projection, heard_map, off_span, projection
from expunge.ops.rows import encode_many, prompt_rows, row_pairs
from expunge.patches.operator import SharedEdit
from expunge.patches.shared import Part, SharedPatch

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Project(Eraser):
    """Project what tells the target from its anchor out of the layers that read the prompt, keeping what is retained.

    W' = W P with one P = I − Uᵀ V L for all layers, where Lᵀ L = Σ_l W_lᵀ W_l. U holds leading mixtures of the
    differences c − c* of target and anchor rows, V L Uᵀ = I makes P a true projection, P P = P of rank d − k, and
    V L p = 0 for every held row p: that of the anchor, of the empty and of the retained prompts.

    Theorem. P p = p for every held row and mixture of them. For every row c of the target and every embedding e,
    Σ_l ‖W_l P e − W_l c‖² ≥ floor(c) = ‖B L c‖², B an orthonormal basis of V's rows, and some e attains it. Proof: P p
    = p − Uᵀ (V L p) = p. V L P = V L − (V L Uᵀ) V L = 0, so B L P e = 0 for every e; the sum is ‖L P e − L c‖² ≥
    ‖B L P e − B L c‖² = ‖B L c‖², and as L P e takes every value with B L P e = 0, it is attained. UCE has no such
    floor: its M is regular, and M⁻¹ c gives all that W c gave.
    Weights W P + E, stored with a rounding E, keep √Σ ≥ √floor − ‖E‖ ‖e‖: embeddings of usual length stay out.
    The floor is about keys and values of these rows, not about pictures: on emoji-unet the embeddings nearest to the
    target's, of usual length, drew it in 36 of 40 pictures (docs/methods.md). It is no defence there.
    held, ridge and templates were chosen on four concepts of emoji-unet (docs/methods.md).
    Source: ours; the constraint is that of LEACE, arXiv:2306.03819, which is not about generators.
    """

    paper: ClassVar[str] = "arXiv:2306.03819"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    composes: ClassVar[bool] = True

    rows: Literal["tail", "word"] = "tail"
    """Rows c of the target, each facing the anchor's. tail: from the last word to the window's end, as the network
    reads padding and it speaks of the word. word: the last word's."""

    held: Literal["words", "word", "window"] = "word"
    """Rows kept exactly of the anchor, the empty and the retained prompts. words: opening token to first closing token.
    word: the last word's. window: all; a few prompts then fill the space. Rows of theirs not held are spared. The more
    is held, the less of the target is left to remove, and the more other rows move."""

    toward: Literal["anchor", "room"] = "anchor"
    """What is removed of U. anchor: all, so P c = P c* wherever c − c* is a mixture of U. room: only its part that no
    held row is heard in; no row is then heard louder than before when ridge is large, and the target becomes the
    nearest mixture of what is left: on emoji-unet still a picture of the target, most often."""

    cut: float = 0.3
    """Directions are removed whose share in a concept's differences, off what is held, is at least this: singular
    values of the differences, each concept's of norm 1. Smaller removes more directions."""

    ridge: float = 1.0
    """lam in V = argmin mean ‖V L x‖² + lam · ‖V‖² over other rows x of anchor, empty and retained prompts, in units of
    the mean square of L x. Smaller spares these rows, larger raises the floor."""

    min_share: float = 0.1
    """Least √(floor / Σ_l ‖W_l c − W_l c*‖²) of every concept, over its rows together; below it the concept lies too
    near to what is held, and InputError names it."""

    templates: tuple[str, ...] = ("{}", "a photo of a {} on a table")
    """Every target phrase is removed in each of these, its anchor in the same, and what is retained is held in each; an
    empty anchor stays empty. A phrase alone does not show how it reads within a sentence."""

    def erase(self, model: Generator, request: Request, run: Run) -> SharedPatch:
        """Patch of one part, bound to the weights it was computed from."""
        sites = model.sites("text_in")
        if not sites:
            raise InputError(f"project edits layers that read the prompt alone; family {model.family!r} has none")
        for name, value in (("ridge", self.ridge), ("cut", self.cut)):
            if value <= 0:
                raise InputError(f"{name} is {value}; legal: above 0")
        texts = [(form.format(t), form.format(a) if a else "") for t, a in request.pairs for form in self.templates]
        retained = [form.format(p) for concept in request.retain for p in concept.prompts for form in self.templates]
        target, anchor = (encode_many(model, side) for side in zip(*texts, strict=True))
        kept = encode_many(model, list(dict.fromkeys(["", *(text for _, text in texts), *retained])))
        edits: dict[str, SharedEdit] = {}
        for route in sorted({site.reads for site in sites}):
            mine = [site for site in sites if site.reads == route]
            pairs = row_pairs(target, anchor, route, self.rows)
            with naming(request.target):
                found = self._project([site.weight for site in mine], self._concepts(pairs, request), kept, route)
            self._certify(found, self._concepts(pairs, request), request, run)
            edits[route] = found.edit
        targets = tuple(concept.name for concept in request.target)
        return SharedPatch.of([Part(targets=targets, edits=edits, bound=True)], model)

    def _concepts(self, pairs: Pairs, request: Request) -> Pairs:
        """Rows of each concept, of all its prompts together, and those they face."""
        found, start = [], 0
        for concept in request.target:
            end = start + len(concept.prompts) * len(self.templates)
            old, new = (torch.cat(side).double() for side in zip(*pairs[start:end], strict=True))
            found.append((old, new))
            start = end
        return found

    def _project(self, weights: Sequence[Tensor], concepts: Pairs, kept: Condition, route: str) -> Projection:
        heard = heard_map(weights)
        room = off_span(torch.cat(prompt_rows(kept, route, self.held)), heard)
        moves = []
        for old, new in concepts:
            size = ((old - new) @ heard.T @ room).norm()
            moves.append((old - new) / size.clamp(min=torch.finfo(torch.float64).tiny))
        other = torch.cat(prompt_rows(kept, route, "window"))
        through = self.toward == "room"
        return projection(torch.cat(moves), heard, room, other, cut=self.cut, ridge=self.ridge, through_room=through)

    def _certify(self, found: Projection, concepts: Pairs, request: Request, run: Run) -> None:
        for index, (concept, (old, new)) in enumerate(zip(request.target, concepts, strict=True)):
            floor = found.floor(old).sum()
            share = float((floor / ((old - new) @ found.heard.T).square().sum()).sqrt())
            run.log("floor", index, float(floor))
            if not share >= self.min_share:
                raise InputError(
                    f"concept {concept.name!r} lies within what is held but for {share:.2g} of what tells it from its "
                    f"anchor; legal: min_share {self.min_share:g} or more (retain less, hold fewer rows, raise ridge)"
                )
