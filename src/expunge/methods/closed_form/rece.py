"""RECE: closed-form erasure, repeated on the embeddings that would undo it (Gong et al., ECCV 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.limits import at_least, naming
from expunge.ops.ridge import output_gram, residual_rows, shared_edit
from expunge.ops.rows import encode_many, prompt_rows, row_pairs
from expunge.patches.operator import SharedEdit
from expunge.patches.shared import Part, SharedPatch

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class RECE(Eraser):
    """Erase a concept in closed form, then, epoch by epoch, the embeddings that bring it back.

    It starts from UCE's edit W' = W M. Each epoch finds, for every row c of the target,
    c' = argmin Σ_l ‖W'_l c' − W_l c‖² + penalty · ‖c'‖² = (penalty · I + Mᵀ S M)⁻¹ Mᵀ S c with S = Σ_l W_lᵀ W_l,
    and sends c' to the anchor's row c* by another such edit of the current weights,
    W'' = argmin strength · Σ ‖W'' c' − W' c*‖² + retain_weight · Σ ‖W'' p − W' p‖² + ridge · ‖W'' − W'‖²_F.
    All layers share one M, so an epoch costs d × d work however many layers there are. After the last epoch W'' is
    again W M with an M regular in general: c → M⁻¹ c undoes RECE as it undoes UCE; only its embeddings grow longer.
    Source: arXiv:2407.12383. Both ridges and retain_weight are ours, chosen on two concepts of emoji-unet; the other
    defaults are the authors' for nudity.
    """

    paper: ClassVar[str] = "arXiv:2407.12383"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    composes: ClassVar[bool] = True

    epochs: int = 3
    """T, how often residual embeddings are found and erased; 0 is UCE. The authors': nudity 3, all unsafe words 2,
    styles and objects 1."""

    penalty: float = 0.1
    """lam in ‖W'c' − W c‖² + lam · ‖c'‖². Larger finds shorter embeddings and spares other concepts. The authors':
    nudity and easy objects 0.1, styles and hard objects 0.001."""

    pull: Literal["zero", "anchor"] = "zero"
    """Where the penalty draws c': zero, the paper's ‖c'‖²; anchor, the code's standard regulariser ‖c' − c*‖²."""

    rows: Literal["tail", "word", "window"] = "tail"
    """Rows of the target whose residuals are erased. The paper derives one embedding. tail: each that the start
    erased, last word to window's end. word: the last word's. window: the code's, all rows by position, the opening
    token's among them, which all prompts share."""

    strength: float = 1.0
    """e in loss = e · Σ ‖W'' c' − W' c*‖² + …, of the start and of every epoch; 0: nothing changes. Authors': 1."""

    retain_weight: float = 1.0
    """p in loss = … + p · Σ ‖W'' r − W' r‖² of an epoch, over all rows of the empty and the retained prompts.
    The authors': 0.1."""

    ridge: float = 100.0
    """lamb in loss = … + lamb · ‖W'' − W'‖²_F of an epoch. The authors': 0.1, which with their other weights spoils
    neighbours on emoji-unet (docs/methods.md)."""

    start_retain_weight: float = 1.0
    """retain_weight of the UCE edit it starts from. The authors': 1 for nudity and objects, 0.1 for styles."""

    start_ridge: float = 100.0
    """ridge of the UCE edit it starts from. The authors' script: 0.5; here uce's own default, for the same reason."""

    @property
    def retains(self) -> bool:
        """Whether retained rows have any weight, in the start or in an epoch."""
        return self.start_retain_weight != 0 or (self.retain_weight != 0 and self.epochs > 0)

    def erase(self, model: Generator, request: Request, run: Run) -> SharedPatch:
        """Patch of one part, bound to the weights it was computed from."""
        sites = model.sites("text_in")
        if not sites:
            raise InputError(f"rece edits layers that read the prompt alone; family {model.family!r} has none")
        at_least(self, {"epochs": 0})
        target, anchor = (encode_many(model, side) for side in zip(*request.pairs, strict=True))
        kept = encode_many(model, ["", *(prompt for concept in request.retain for prompt in concept.prompts)])
        edits: dict[str, SharedEdit] = {}
        for route in sorted({site.reads for site in sites}):
            mine = [site for site in sites if site.reads == route]
            held = torch.cat(prompt_rows(kept, route, "window"))
            pairs = row_pairs(target, anchor, route, self.rows)
            with naming(request.target):
                start = self._edit(row_pairs(target, anchor, route, "tail"), held, start=True)
                edits[route] = self._alternate(start, pairs, held, [site.weight for site in mine], run)
        targets = tuple(concept.name for concept in request.target)
        return SharedPatch.of([Part(targets=targets, edits=edits, bound=True)], model)

    def _alternate(
        self, edit: SharedEdit, pairs: Pairs, held: Tensor, weights: Sequence[Tensor], run: Run
    ) -> SharedEdit:
        gram = output_gram(weights)
        for epoch in range(self.epochs):
            found = [
                (residual_rows(key, gram, edit, self.penalty, goal if self.pull == "anchor" else None), goal)
                for key, goal in pairs
            ]
            edit = edit.then(self._edit(found, held, start=False))
            run.progress("epochs", epoch + 1, self.epochs)
        return edit

    def _edit(self, pairs: Pairs, held: Tensor, *, start: bool) -> SharedEdit:
        weight, ridge = (self.start_retain_weight, self.start_ridge) if start else (self.retain_weight, self.ridge)
        keys, goals = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        gain, retain_gain = keys.new_full(keys.shape[:1], self.strength), keys.new_full(held.shape[:1], weight)
        return shared_edit(keys, goals, gain, held.double(), retain_gain, ridge)
