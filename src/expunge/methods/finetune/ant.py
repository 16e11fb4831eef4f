"""ANT: keep the direction of denoising early, reverse it late, hold the unconditional one (Li et al., ACM MM 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator, State
from expunge.ops.fit import fit
from expunge.ops.fusion import Learned, fused, window_gram
from expunge.ops.guidance import guide
from expunge.ops.limits import at_least
from expunge.ops.rows import at_scales
from expunge.ops.saliency import Look, common, most_salient
from expunge.ops.student import Learner, LowRankStudent, Student
from expunge.ops.trajectory import Goals, Walk, predict_each
from expunge.ops.wording import sentences
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.operator import SharedEdit
from expunge.patches.weights import WeightPatch


@dataclass(frozen=True, kw_only=True)
class ANT(Eraser):
    """Teach the target's prediction its own direction before t' and the reverse after, "" its own.

    L = w ‖f(c) − (u + s η (c_0 − u))‖² + w_u ‖f("") − u‖², u and c_0 the frozen model's, with s, w, w_u =
    −1, 1, λ_2 where t < t' (late) and +1, λ_1, λ_3 where t ≥ t' (early).
    multi: W* = argmin Σ_i Σ_e ‖W* e − (W + B_i A_i) e‖² + Σ_p ‖W* p − W p‖² + ridge · ‖W* − W‖²_F over adapters i.
    """

    paper: ClassVar[str] = "arXiv:2504.12782"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    uses_anchor: ClassVar[bool] = False
    uses_retain: ClassVar[bool] = False
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"moves_the_target_more_than_what_is_retained": "Nothing is retained but the empty prompt; a toy moves as one."}
    )

    mode: Literal["single", "multi"] = "single"
    """single: full weights under the mask. multi: adapters and fusion, U-Nets only."""

    turn: float = 0.8
    """t' in the model's levels. The paper: styles 0.94, identities 0.8, nudity 0.86; in flows 0.912, 0.836, 0.871."""

    reverse_time: bool = False
    """Swap early and late, as the authors' code for one concept does by mistake."""

    strength: float = 1.0
    """eta in goal = u + s · eta · (c_0 − u). The paper: 1."""

    early: float = 0.4
    """λ_1. The paper: 0.4; for nudity 1."""

    uncond_late: float = 0.5
    """λ_2. The paper: 0.5."""

    uncond_early: float = 0.2
    """λ_3. The paper: 0.2, its code λ_1 λ_2; for nudity 0.5."""

    maps: int = 8
    """Saliency maps intersected, each of one picture. The paper: about 100 for four concepts; 0: no mask."""

    share: float = 0.5
    """Share of scalars each map keeps. The code: 0.5."""

    rank: int = 8
    """Rank of an adapter in multi, over keys and values, which is all that fusion keeps. The code: 64, everywhere."""

    ridge: float = 30.0
    """Weight of ‖W* − W‖²_F in multi, where "" is held besides. The code: none, but captions of MS-COCO to hold."""

    templates: tuple[str, ...] = ("{}", "a picture of a {}", "a {} on a plain background", "a flat picture of a {}")
    """Sentences about a concept that fusion must carry over, in multi."""

    pool: int = 64
    """States of the frozen model's paths, walked once; each step draws `batch` of them."""

    walk: int = 50
    """Sampler steps of a whole path. The paper: 50."""

    guidance_scale: float = 3.0
    """w in u + w · (c − u) along paths. The code: 3, in multi 7.5."""

    embedded_scales: tuple[float, ...] = (1.0, 3.5)
    """Scales a guidance-distilled model is taught at, taking turns; without meaning where guidance is true."""

    steps: int = 200
    """Optimizer steps, in multi of each adapter. The paper: 400; for nudity 250."""

    lr: float = 2e-5
    """Adam's step size. The paper: 5e-4. Adapters (multi) want more: 1e-3."""

    batch: int = 4
    """States per step. The paper: 1."""

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch | LowRankPatch:
        """Patch of deltas on the masked group (single), or of factors on every text-reading layer (multi)."""
        at_least(self, {"maps": 0, "ridge": 0})
        if self.mode == "multi":
            return self._fused(model, request, run)
        student, look = Student.of(model, "all"), Look("gradient", pictures=1, draws=self.batch, steps=self.walk)
        phrases = [phrase for phrase, _ in request.pairs]
        asked = [(phrases[i % len(phrases)], run.apart("map", i)) for i in range(self.maps)]
        if asked:
            student.restrict(common(most_salient(look.scores(student, [a], own), self.share) for a, own in asked))
        self._steer(student, phrases, run)
        return student.patch()

    def _steer(self, student: Learner, phrases: list[str], run: Run) -> None:
        model, sides = student.model, (phrases, [""] * len(phrases))
        target, uncond = (at_scales(model.encode(side), self.embedded_scales) for side in sides)

        def teach(state: State, which: Tensor) -> Goals:
            u, c = predict_each(model, state, [uncond.take(which), target.take(which)])
            return u, guide(u, c, -self.strength), guide(u, c, self.strength)

        walk = Walk(prompts=target, batch=self.batch, guidance_scale=self.guidance_scale, steps=self.walk)
        lesson = walk.pooled(model, teach, run, size=max(self.pool, len(target)))

        def loss(step: int) -> Tensor:
            now = lesson(step)
            u, c = predict_each(student.view(), now.state, [uncond.take(now.which), target.take(now.which)])
            late = (torch.as_tensor(now.state.t) < self.turn) != self.reverse_time
            told = torch.where(late, model.distance(c, now.goals[1]), self.early * model.distance(c, now.goals[2]))
            held = torch.where(late, self.uncond_late, self.uncond_early) * model.distance(u, now.goals[0])
            return (told + held).mean()

        fit(student, loss, run, steps=self.steps, lr=self.lr, state=())

    def _fused(self, model: Generator, request: Request, run: Run) -> LowRankPatch:
        if model.family != "unet":
            raise InputError(f"mode is 'multi', which family {model.family!r} has no fusion for; legal: 'single'")
        paths, learned = [site.path for site in model.sites("text_in")], list[Learned]()
        for i, concept in enumerate(request.target):
            own = run.apart("concept", i)
            student = LowRankStudent.of(model, paths, rank=self.rank, rng=own.rng("factors"))
            self._steer(student, list(concept.prompts), own)
            said = window_gram(model, [line.text for line in sentences(self.templates, concept.prompts)])
            learned.append((said, student.patch().factors))
        prior = window_gram(model, [""])
        _, factors = fused(SharedEdit(moves=prior[:0], duals=prior[:0]), learned, prior, self.ridge)
        return LowRankPatch({path: (down.float(), up.float()) for path, (down, up) in factors.items()})
