"""EraseAnything: low-rank steps that erase and steps that keep, in turns, on flow transformers (ICML 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator, State
from expunge.ops.contrast import reverse_contrast
from expunge.ops.fit import fit
from expunge.ops.flow import flow_matching, own_latents
from expunge.ops.guidance import guide
from expunge.ops.rows import at_scales
from expunge.ops.student import LowRankStudent
from expunge.ops.tap import attended, feature, joint_attention, mass
from expunge.ops.trajectory import Goals, Walk, predict_each
from expunge.ops.wording import Shown, Wording, wordings
from expunge.patches.lowrank import LowRankPatch


@dataclass(frozen=True, kw_only=True)
class EraseAnything(Eraser):
    """Train low-rank text queries and keys of joint attention to erase, and every other step to keep the rest.

    even steps: ‖v'(target) − goal‖² + attention_weight · Σ attention of the image to the target's words,
    goal = n − strength · (v(target) − n), n = v(anchor);
    odd steps: keep_weight · ‖v'(x_t, other) − (eps − x_0)‖² + contrast_weight · reverse_contrast(F', F_near, F_far).
    v', F' the student's, the rest and the x_0 the frozen model's. F: where the image attends to a word. Turns stand for
    the bi-level problem, as in the authors' code, whose faults (drifting teacher, wrong noise levels) are not kept.
    """

    paper: ClassVar[str] = "arXiv:2412.20413"
    families: ClassVar[frozenset[Family]] = frozenset({"mmdit"})
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"moves_the_target_more_than_what_is_retained": "An untrained toy's pictures hold no flow that could be kept."}
    )

    strength: float = 1.0
    """eta in goal = n − eta · (v(target) − n), n under the anchor, or "" without one. The authors' code: 1."""

    attention_weight: float = 1e-3
    """Weight of the attention to the target's words, summed over image positions. The authors' code: 1e-3."""

    keep_weight: float = 0.1
    """Weight of the flow-matching loss on pictures of something else. The authors' code: 0.1."""

    contrast_weight: float = 0.1
    """Weight of the reverse contrast. The authors' code: 0.1."""

    temperature: float = 0.07
    """tau in the reverse contrast, s / tau. The paper: 0.07."""

    irrelevant: tuple[str, ...] = ("tree", "chair", "cloud")
    """Words F is drawn to, and pictures are drawn of where nothing is retained. The paper asks a language model for
    three per target; these are ours. F_near is another phrase of the target, or the same if it has one only."""

    blocks: Literal["all", "last"] = "all"
    """Double blocks whose attention is read. The authors' code: the last."""

    template: str = "a photo of {}"
    """Sentence around target, anchor and the other words."""

    shuffle: float = 0.9
    """Share of sentences whose words are shuffled. The authors' code: 0.9."""

    rank: int = 8
    """Rank of the factors, alpha equal to it. The authors' code: 8."""

    pool: int = 64
    """States on the target's paths, walked up front by the frozen model and taught there; each step draws `batch`."""

    pictures: int = 16
    """Pictures of other things, drawn up front at guidance scale 1."""

    walk: int = 28
    """Sampler steps of a path or a picture. The paper: 28."""

    guidance_scale: float = 3.0
    """w in u + w · (c − u) along paths and in pictures. The authors' code: 3, embedded."""

    embedded_scales: tuple[float, ...] = (1.0, 3.5)
    """Scales g a guidance-distilled model is taught at, taking turns; without meaning where guidance is true."""

    steps: int = 1000
    """Optimizer steps, erasing and keeping ones together. The paper: 1000; its code: 200 to 300."""

    lr: float = 1e-3
    """Adam's step size in even steps. The paper: 1e-3."""

    keep_lr: float = 5e-4
    """Adam's step size in odd steps. The paper: 5e-4."""

    batch: int = 4
    """States per step. The authors' code: 1."""

    def erase(self, model: Generator, request: Request, run: Run) -> LowRankPatch:
        """Patch of low-rank factors on `add_q_proj` and `add_k_proj` of every double block."""
        if not self.irrelevant or {word for word, _ in request.pairs} & set(self.irrelevant):
            raise InputError(f"irrelevant is {self.irrelevant}; legal: one word or more, none of them a target")
        paths = [f"{path}.add_{part}_proj.weight" for path in joint_attention(model) for part in "qk"]
        student = LowRankStudent.of(model, paths, rank=self.rank, rng=run.rng("factors"))
        lines, anchors, near = self._lines(request, run)
        sides = (lines, near, *([line.about(word) for line in lines] for word in self.irrelevant))
        target, *others = (Shown.of(model, side, self.embedded_scales) for side in sides)
        neutral = at_scales(model.encode(anchors), self.embedded_scales)

        def teach(state: State, which: Tensor) -> Goals:
            n, c = predict_each(model, state, [neutral.take(which), target.cond.take(which)])
            rows = (other.take(which) for other in others)
            near, *far = (feature(attended(model, state, r, self.blocks)[1], r.columns) for r in rows)
            return guide(n, c, -self.strength), near, torch.stack(far, 1)

        walk = Walk(prompts=target.cond, batch=self.batch, guidance_scale=self.guidance_scale, steps=self.walk)
        lesson = walk.pooled(model, teach, run, size=self.pool)
        clean, texts = self._kept(model, request, run)

        def loss(step: int) -> Tensor:
            now, view = lesson(step), student.view()
            (goal, near, far), row = now.goals, target.take(now.which)
            pred, maps = attended(view, now.state, row, self.blocks)
            if step // run.parts % 2 == 0:
                return (model.distance(pred, goal) + self.attention_weight * mass(maps, row.columns)).mean()
            unlike = reverse_contrast(feature(maps, row.columns), near, far, self.temperature).mean()
            i = torch.randint(len(clean), (self.batch,), generator=run.rng("picture", step))
            kept = flow_matching(view, clean[i], texts.take(i), run.rng("noise", step)).mean()
            return self.keep_weight * kept + self.contrast_weight * unlike

        fit(student, loss, run, steps=self.steps, lr=(self.lr, self.keep_lr), state=())
        return student.patch()

    def _lines(self, request: Request, run: Run) -> tuple[list[Wording], list[str], list[Wording]]:
        pairs = list(request.pairs)
        near = [c.prompts[i - 1] for c in request.target for i in range(len(c.prompts))]
        turns = [i % len(pairs) for i in range(max(len(pairs), self.pool // len(self.embedded_scales or (1,))))]
        lines = wordings(self.template, [pairs[i][0] for i in turns], self.shuffle, run.rng("wording"))
        anchors = [x.about(pairs[i][1]).text if pairs[i][1] else "" for x, i in zip(lines, turns, strict=True)]
        return lines, anchors, [line.about(near[i]) for line, i in zip(lines, turns, strict=True)]

    def _kept(self, model: Generator, request: Request, run: Run) -> tuple[Tensor, Condition]:
        phrases = [prompt for concept in request.retain for prompt in concept.prompts] or list(self.irrelevant)
        phrases *= max(1, self.pictures // len(phrases))
        texts = [line.text for line in wordings(self.template, phrases, 0.0, run.rng("kept"))]
        return own_latents(model, texts, run, steps=self.walk), model.encode(texts)
