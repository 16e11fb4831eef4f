"""UCE: closed-form edit of the layers that read the prompt (Gandikota et al., WACV 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, Literal

import torch

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import EditSite, Family, Generator
from expunge.ops.equations import Ask, Pairs, erasures, solve
from expunge.ops.limits import naming
from expunge.ops.rows import encode_many, prompt_rows, row_pairs
from expunge.patches.shared import SharedPatch
from expunge.patches.weights import WeightPatch


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
    composes: ClassVar[bool] = True

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

    def erase(self, model: Generator, request: Request, run: Run) -> SharedPatch | WeightPatch:
        """Patch of one part a concept, from the text alone; of full differences where the technique is tensor."""
        sites = model.sites("text_in")
        if not sites:
            raise InputError(f"uce edits layers that read the prompt alone; family {model.family!r} has none")
        if self.mode == "uce2025" and self.technique == "tensor":
            raise InputError("technique 'tensor' exists for mode 'uce2023' only; legal with 'uce2025': replace")
        texts = [(form.format(t), form.format(a) if a else "") for t, a in request.pairs for form in self.templates]
        target, anchor = (encode_many(model, side) for side in zip(*texts, strict=True))
        retained = [form.format(p) for concept in request.retain for p in concept.prompts for form in self.templates]
        retained = ["", *retained] if self.mode == "uce2023" else retained
        kept = encode_many(model, retained) if retained else None
        asks: dict[str, Ask] = {}
        for route in sorted({site.reads for site in sites}):
            pairs = row_pairs(target, anchor, route, "tail" if self.mode == "uce2023" else "word")
            held = prompt_rows(kept, route, "window" if self.mode == "uce2023" else "word") if kept else []
            rows = torch.cat([*held, pairs[0][0][:0]])
            asks[route] = Ask(self._by_concept(pairs, request), self.strength, rows, self._hold(len(retained)))
        if self.technique == "tensor":
            with naming(request.target):
                return self._by_layer(sites, asks, run)
        said = {"retain": sorted(retained), "weight": self._hold(len(retained)), "ridge": self.ridge, "rows": self.mode}
        with naming(request.target):
            parts = erasures(asks, self.ridge, said)
        return SharedPatch.of(parts, model)

    def _hold(self, prompts: int) -> float:
        if self.retain_weight is not None:
            return self.retain_weight
        return max(0.1, 1 / max(1, prompts)) if self.mode == "uce2023" else 1.0

    def _by_concept(self, pairs: Pairs, request: Request) -> dict[str, Pairs]:
        left = iter(pairs)
        sizes = {concept.name: len(concept.prompts) * len(self.templates) for concept in request.target}
        return {name: list(islice(left, size)) for name, size in sizes.items()}

    def _by_layer(self, sites: Sequence[EditSite], asks: Mapping[str, Ask], run: Run) -> WeightPatch:
        """Moves of each layer in the tensor technique: goal g − alpha · c, alpha = ⟨W c, W g⟩ / ‖W c‖² per pair."""
        solved = {route: solve(ask, self.ridge, aligned=True) for route, ask in asks.items()}
        deltas = {}
        for done, site in enumerate(sites, 1):
            weight, moves = site.weight.double(), []
            for key, goal in (pair for pairs in asks[site.reads].pairs.values() for pair in pairs):
                before, values = key.double() @ weight.T, goal.double() @ weight.T
                alpha = (before * values).sum() / before.square().sum()
                moves.append(self.strength * (goal.double() - alpha * key.double() - key.double()))
            delta = replace(solved[site.reads], moves=torch.cat(moves)).delta(site.weight)
            deltas[site.path] = delta.to(torch.promote_types(site.weight.dtype, torch.float32))
            run.progress("layers", done, len(sites))
        return WeightPatch({path: delta for path, delta in deltas.items() if bool(delta.any())})
