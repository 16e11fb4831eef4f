"""MACE: closed-form refinement, one rank-1 adapter per concept, closed-form fusion (Lu et al., CVPR 2024)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Family, Generator
from expunge.ops.alignment import ending, surroundings
from expunge.ops.fit import fit
from expunge.ops.fusion import Learned, fused, refined, row_gram, row_shift, window_gram
from expunge.ops.levels import noised_at
from expunge.ops.limits import at_least, naming
from expunge.ops.listening import CrossTap, listen, masked_attention
from expunge.ops.scenes import Scenes
from expunge.ops.student import LowRankStudent
from expunge.ops.wording import sentences
from expunge.patches.lowrank import product
from expunge.patches.operator import SharedEdit
from expunge.patches.weights import WeightPatch


@dataclass(frozen=True, kw_only=True)
class MACE(Eraser):
    """Free other words of the target, teach the image not to look at it, then solve for weights that do both.

    1. Refinement: W' = argmin Σ ‖W' e − W g‖² + Σ_p λ_p ‖W' p − W p‖² + ridge · ‖W' − W‖²_F, e rows of all words but
       the target in sentences about it, closing token and padding too, g of the same words in sentences about the
       anchor (without one, in sentences that leave the target out), p of what is held.
    2. Adapters of rank 1, one per concept, over keys and values: loss = Σ_layers ‖A[heads, mask, S]‖_F², A the
       attention of W' + B A to the words S of the target, mask its place in noised pictures.
    3. Fusion: W* = argmin Σ_i Σ_e ‖W* e − (W' + B_i A_i) e‖² + Σ_p λ_p ‖W* p − W p‖² + ridge · ‖W* − W'‖²_F, e all rows
       of sentences about concept i.
    Source: arXiv:2403.06135. It has no ridge, but 600 000 captions to hold. Its masks are a segmenter's; by default
    ours are the model's own attention.
    """

    paper: ClassVar[str] = "arXiv:2403.06135"
    families: ClassVar[frozenset[Family]] = frozenset({"unet"})

    masks: str = "attention"
    """Where the loss looks. attention: the frozen model's, to the target. whole: all (styles). package.module:name: any
    callable from picture "1 3 h w" and phrase to mask "1 h w", such as the paper's segmenter; it is imported."""

    threshold: float = 0.5
    """Attention masks: how far from a picture's least attention to its greatest a place must lie to count."""

    words: Literal["phrase", "ending"] = "phrase"
    """S. phrase: the target's words, the paper's. ending: also closing token and padding, the code's."""

    norm: Literal["squared", "plain"] = "squared"
    """squared: ‖·‖_F², the paper's. plain: ‖·‖_F, the code's."""

    templates: tuple[str, ...] = ("{}", "a picture of a {}", "a {} on a plain background", "a flat picture of a {}")
    """Sentences about target, anchor and retained concepts, ours. The code: 30 for each kind of concept."""

    prior: tuple[str, ...] = ("",)
    """Texts held as they are, all their rows. The paper: captions of MS-COCO."""

    prior_weight: float = 1.0
    """λ_p of each row of `prior`, in refinement and fusion. The code: 1e-4, for objects 0."""

    retain_weight: float = 1.0
    """λ_p of each row of retained concepts. The code: 8e3 to 2e5 times prior_weight."""

    refinement: Literal["once", "twice"] = "once"
    """How often prior_weight enters refinement: twice, all λ_p times prior_weight once more, is the code's."""

    ridge: float = 30.0
    """Weight of ‖W' − W‖²_F and ‖W* − W'‖²_F. The paper: 0. The code: 10 to 1000 where it holds no captions."""

    pictures: int = 8
    """Pictures of each concept, drawn by the frozen model; at least one of each phrase."""

    guidance_scale: float = 7.5
    """w in u + w · (c − u) of these pictures."""

    walk: int = 30
    """Sampler steps of these pictures."""

    levels: Literal["middle", "uniform"] = "middle"
    """Noise levels t: density ∝ σ(50 (t − 0.2)) − σ(50 (t − 0.4)), the paper's; or uniform, its code's for nudity."""

    steps: int = 50
    """Optimizer steps of each adapter; 0 stops after refinement."""

    lr: float = 1e-4
    """Adam's step size. The code: 1e-4, for objects and nudity 1e-5."""

    batch: int = 4
    """Noised pictures per step. The code: 1."""

    @property
    def retains(self) -> bool:
        """Whether retained rows have any weight."""
        return self.retain_weight != 0

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch:
        """Patch of float64 deltas on every text-reading layer, cast to the weights' dtype (float32 at least)."""
        CrossTap.of(model)  # refuses models without maps to train on before anything is drawn
        at_least(self, {"steps": 0, "pictures": 1, "batch": 1, "prior_weight": 0, "retain_weight": 0, "ridge": 0})
        sites = {site.path: site.weight for site in model.sites("text_in")}
        kept = sentences(self.templates, [prompt for concept in request.retain for prompt in concept.prompts])
        prior = self.prior_weight * window_gram(model, self.prior)
        prior = prior + self.retain_weight * window_gram(model, [line.text for line in kept])
        with naming(request.target):
            edit = self._refine(model, request, prior if self.refinement == "once" else prior * self.prior_weight)
        change = {path: edit.delta(weight) for path, weight in sites.items()}
        if self.steps:
            near = WeightPatch(change).on(model)
            learned = (self._adapter(model, near, *numbered, run) for numbered in enumerate(request.target))
            with naming(request.target):
                edit, factors = fused(edit, learned, prior, self.ridge)
            change = {path: edit.delta(weight) for path, weight in sites.items()}
            change |= {path: change[path] + product(*pair) for path, pair in factors.items()}
        wide = {path: torch.promote_types(weight.dtype, torch.float32) for path, weight in sites.items()}
        return WeightPatch({path: delta.to(wide[path]) for path, delta in change.items() if bool(delta.any())})

    def _refine(self, model: Generator, request: Request, prior: Float[Tensor, "d d"]) -> SharedEdit:
        shift, gram = torch.zeros_like(prior), torch.zeros_like(prior)
        for target, anchor in request.pairs:
            lines = sentences(self.templates, [target])
            for old, new in surroundings(model, [(line, line.about(anchor)) for line in lines]):
                shift, gram = shift + row_shift(old, new), gram + row_gram(old)
        return refined(shift, gram, prior, self.ridge)

    def _adapter(self, model: Generator, near: Generator, index: int, concept: Concept, run: Run) -> Learned:
        own = replace(
            run.apart("concept", index), log=lambda name, step, x: run.log(name, index * self.steps + step, x)
        )
        lines = sentences(self.templates, concept.prompts)
        some = [lines[i % len(lines)] for i in range(max(self.pictures, len(concept.prompts)))]
        scenes = Scenes.drawn(model, some, own, guidance_scale=self.guidance_scale, steps=self.walk)
        masks = scenes.masks(model, self.masks, self.threshold, self.levels, own)
        said = scenes.columns | ending(scenes.cond) if self.words == "ending" else scenes.columns
        student = LowRankStudent.of(near, [site.path for site in near.sites("text_in")], rank=1, rng=own.rng("factors"))

        def loss(step: int) -> Tensor:
            i = torch.randint(len(some), (self.batch,), generator=own.rng("picture", step))
            state = noised_at(model, scenes.clean[i], own.rng("noise", step), self.levels)
            maps = listen(student.view(), state, scenes.cond.take(i))
            return masked_attention(maps, said[i], masks[i], squared=self.norm == "squared").mean()

        fit(student, loss, own, steps=self.steps, lr=self.lr, state=())
        return window_gram(model, [line.text for line in lines]), student.patch().factors
