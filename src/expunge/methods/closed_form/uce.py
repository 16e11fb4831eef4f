"""UCE: closed-form edit of the layers that read the prompt (Gandikota et al., WACV 2024)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import EditSite, Family, Generator
from expunge.ops.ridge import SharedEdit, shared_edit
from expunge.ops.rows import encode_many, prompt_rows, row_pairs
from expunge.patches.weights import WeightPatch

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class UCE(Eraser):
    """Solve for key and value weights that send the target's embeddings to the anchor's old outputs.

    W' = argmin strength · Σ ‖W' c − W c*‖² + retain_weight · Σ ‖W' p − W p‖² + ridge · ‖W' − W‖²_F over rows c of
    the target, c* of the anchor, p of what is retained. All layers get W' = W M with one M, so on embeddings where
    M is regular c → M⁻¹ c undoes the edit: closed-form erasure alone is no defence against embedding attacks.
    MMDiTs hear the prompt by two routes with an M each: every encoder's rows, and the pooled text, one row a prompt.
    Their layers have biases, which stay as they are and in no goal: the target gives W c* + b.
    Source: arXiv:2308.14761, eq. 7, and the two variants of the authors' code, which are different algorithms.
    """

    paper: ClassVar[str] = "arXiv:2308.14761"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})

    mode: Literal["uce2023", "uce2025"] = "uce2023"
    """uce2023, the paper's: every row from the last word to the window's end, both aligned at their last words;
    the empty prompt is retained with all its rows. uce2025: the last word's row only, nothing retained unasked."""

    technique: Literal["replace", "tensor"] = "replace"
    """replace: c* is the anchor. tensor (uce2023 only): the anchor's output less its component along the target's,
    v − ⟨u, v⟩ u with u = W c / ‖W c‖, norms over all rows of a prompt."""

    strength: float = 1.0
    """a in loss = a · Σ ‖W' c − W c*‖² + …; 0: nothing changes. The authors' code: 1."""

    retain_weight: float | None = None
    """b in loss = … + b · Σ ‖W' p − W p‖². None is the authors' rule: max(0.1, 1 / number of retained
    prompts, the empty one counted) in uce2023, 1 in uce2025."""

    ridge: float = 100.0
    """lam in loss = … + lam · ‖W' − W‖²_F. Larger stays nearer to the old weights. The authors' code: 0.5, which
    leaves directions that no row holds free to move: on emoji-unet it spoils neighbours (docs/methods.md)."""

    templates: tuple[str, ...] = ("{}",)
    """Every target phrase is edited in each of these, its anchor in the same, and what is retained is held in each; an
    empty anchor stays empty. The authors' prompt expansion uses five for the target alone, such as "image of {}"."""

    @property
    def retains(self) -> bool:
        """Whether retained rows have any weight."""
        return self.retain_weight != 0

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch:
        """Patch of float64 deltas on every text-reading layer, cast to the weights' dtype (float32 at least)."""
        sites = model.sites("text_in")
        if not sites:
            raise InputError(f"uce edits layers that read the prompt alone; family {model.family!r} has none")
        if self.mode == "uce2025" and self.technique == "tensor":
            raise InputError("technique 'tensor' exists for mode 'uce2023' only; legal with 'uce2025': replace")
        texts = [(form.format(t), form.format(a) if a else "") for t, a in request.pairs for form in self.templates]
        target, anchor = (model.encode(side) for side in zip(*texts, strict=True))
        retained = [form.format(p) for concept in request.retain for p in concept.prompts for form in self.templates]
        retained = ["", *retained] if self.mode == "uce2023" else retained
        kept = encode_many(model, retained) if retained else None
        solved = {}
        for route in sorted({site.reads for site in sites}):
            pairs = row_pairs(target, anchor, route, "tail" if self.mode == "uce2023" else "word")
            held = prompt_rows(kept, route, "window" if self.mode == "uce2023" else "word") if kept else []
            solved[route] = pairs, self._solve(pairs, held, len(retained))
        deltas = {}
        for done, site in enumerate(sites, 1):
            pairs, edit = solved[site.reads]
            own = replace(edit, moves=self._off_target(site, pairs)) if self.technique == "tensor" else edit
            wide = torch.promote_types(site.weight.dtype, torch.float32)
            deltas[site.path] = own.delta(site.weight).to(wide)
            run.progress("layers", done, len(sites))
        return WeightPatch({path: delta for path, delta in deltas.items() if bool(delta.any())})

    def _solve(self, pairs: Pairs, kept: list[Tensor], prompts: int) -> SharedEdit:
        weight = self.retain_weight
        if weight is None:
            weight = max(0.1, 1 / prompts) if self.mode == "uce2023" else 1.0
        keys, goals = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        rows = torch.cat([*kept, keys[:0]])
        gain, retain_gain = keys.new_full(keys.shape[:1], self.strength), keys.new_full(rows.shape[:1], weight)
        aligned = self.technique == "tensor"
        return shared_edit(keys, goals, gain, rows, retain_gain, self.ridge, aligned=aligned)

    def _off_target(self, site: EditSite, pairs: Pairs) -> Tensor:
        """Moves of one layer in the tensor technique: goal g − alpha · c, alpha = ⟨W c, W g⟩ / ‖W c‖² per pair."""
        weight, moves = site.weight.double(), []
        for key, goal in pairs:
            before, values = key.double() @ weight.T, goal.double() @ weight.T
            alpha = (before * values).sum() / before.square().sum()
            moves.append(self.strength * (goal.double() - alpha * key.double() - key.double()))
        return torch.cat(moves)
