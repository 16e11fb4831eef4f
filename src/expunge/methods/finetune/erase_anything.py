"""EraseAnything: low-rank steps that erase and steps that keep, in turns, on flow transformers (ICML 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Family, Generator, State
from expunge.ops.asked import Asked, turns
from expunge.ops.contrast import CONTRASTS
from expunge.ops.fit import fit
from expunge.ops.flow import OwnScenes
from expunge.ops.guidance import guide
from expunge.ops.limits import above
from expunge.ops.rows import scale_count
from expunge.ops.student import LowRankStudent
from expunge.ops.tap import feature, joint_attention, paid, tapped
from expunge.ops.trajectory import Goals
from expunge.ops.wording import wordings
from expunge.patches.lowrank import LowRankPatch


@dataclass(frozen=True, kw_only=True)
class EraseAnything(Eraser):
    """Train low-rank text queries and keys of joint attention to erase, and every other step to keep the rest.

    even steps: ‖v'(target) − goal‖² + attention_weight · Σ attention of the image to the target's words,
    goal = n − strength · (v(target) − n), n = v(anchor);
    odd steps: keep_weight · ‖v'(x_t, other) − (eps − x_0)‖² + contrast_weight · reverse_contrast(F', F_near, F_far).
    v', F' the student's, the rest and x_0 the frozen model's. F: where the image attends to a word. Turns stand for the
    bi-level problem, as in the authors' code, five of whose faults are options here, none of them a default.
    Left open: CLIP's pooled text reaches the modulation of every block as before, whatever is trained here.
    """

    paper: ClassVar[str] = "arXiv:2412.20413"
    families: ClassVar[frozenset[Family]] = frozenset({"mmdit"})
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"moves_the_target_more_than_what_is_retained": "An untrained toy's pictures hold no flow that could be kept."}
    )

    strength: float = 1.0
    """eta in goal = n − eta · (v(target) − n), n under the anchor, or "" without one. The authors' code: 1."""

    teacher: Literal["frozen", "drifting"] = "frozen"
    """Who walks paths and says goal, F_near, F_far. drifting, the authors' code: the student, anew in every step."""

    levels: Literal["own", "unrelated"] = "own"
    """own: states are read at the t their path stopped at. unrelated, the authors' code: noise, at a uniform t."""

    attention: Literal["sum", "norms"] = "sum"
    """sum: what image positions pay, mean over heads. norms, the authors' code: image and text, norm over heads."""

    attention_weight: float = 1e-3
    """Weight of the attention to the target's words, summed over image positions. The authors' code: 1e-3."""

    keep_weight: float = 0.1
    """Weight of the flow-matching loss on pictures of something else. The authors' code: 0.1."""

    kept: Literal["others", "target"] = "others"
    """What pictures of odd steps show. others: what is retained, or `irrelevant`. target, the authors' code: it."""

    contrast: Literal["both", "near"] = "both"
    """both: F is drawn to F_far and off F_near. near, the authors' code: off F_near alone, F_far enter as constants."""

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
    """Scales a guidance-distilled model is taught at, taking turns; without meaning where guidance is true."""

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
        above(self, {"temperature": 0})
        paths = [f"{path}.add_{part}_proj.weight" for path in joint_attention(model) for part in "qk"]
        student = LowRankStudent.of(model, paths, rank=self.rank, rng=run.rng("factors"))
        each = self.pool // scale_count(model.encode([""]), self.embedded_scales)
        lines = turns(request, self.template, self.shuffle, each, run.rng("wording"))
        asked = Asked.of(model, lines, self.irrelevant, self.embedded_scales)
        drifting = self.teacher == "drifting"

        def teach(state: State, which: Tensor) -> Goals:
            n, c, near, far = asked.said(student.view() if drifting else model, state, which, self.blocks)
            return guide(n, c, -self.strength), near, far

        walk = asked.walk(self.levels, self.batch, self.guidance_scale, self.walk)
        lesson = walk.lessons(model, student.view, teach, run, fresh=drifting, size=self.pool)
        others = [prompt for concept in request.retain for prompt in concept.prompts] or self.irrelevant
        shown = others if self.kept == "others" else [phrase for phrase, _ in request.pairs]
        held = OwnScenes.of(model, wordings(self.template, shown, 0.0, run.rng("kept")), run, self.pictures, self.walk)

        def loss(step: int) -> Tensor:
            now, view = lesson(step), student.view()
            (goal, near, far), row = now.goals, asked.target.take(now.which)
            v, tap = tapped(view, now.state, row, self.blocks)
            if step // run.parts % 2 == 0:
                return (model.distance(v, goal) + self.attention_weight * paid(tap, row.columns, self.attention)).mean()
            unlike = CONTRASTS[self.contrast](feature(tap.text_maps(), row.columns), near, far, self.temperature).mean()
            kept = held.flow_matching(view, self.batch, run, step).mean()
            return self.keep_weight * kept + self.contrast_weight * unlike

        fit(student, loss, run, steps=self.steps, lr=(self.lr, self.keep_lr), state=())
        return student.patch()
