"""ESD: fine-tune the target-conditional prediction toward its own negation (Gandikota et al., ICCV 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Family, Generator, State
from expunge.ops.fit import fit
from expunge.ops.rows import at_scales
from expunge.ops.student import trainable
from expunge.ops.trajectory import Goals, Walk
from expunge.ops.wording import framed
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.weights import WeightPatch


@dataclass(frozen=True, kw_only=True)
class ESD(Eraser):
    """Train the target-conditional prediction to equal the frozen model's negatively guided one.

    loss = ‖ eps_student(x_t, t, target) − goal ‖²,  goal = u − strength · (c − u),
    with u, c the frozen model's predictions under "" and the target. Several targets: each state draws one.
    The paper names no destination, so the request's anchors and retained concepts are not used. In flow models eps
    reads velocity: the goal is affine, so it names the same model. Guidance-distilled ones answer a scale g with
    u + g · (c − u); the same goal at every g is then what distilling the erased model would give.
    """

    paper: ClassVar[str] = "arXiv:2303.07345"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    uses_anchor: ClassVar[bool] = False
    uses_retain: ClassVar[bool] = False
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "moves_the_target_more_than_what_is_retained": "Only the target's prediction is supervised and the weights "
            "are shared, so every prompt moves; an untrained toy has no structure that would keep others back."
        }
    )

    group: Literal["cross_attention", "non_cross_attention", "cross_kv", "all"] = "non_cross_attention"
    """What is trained. The paper: ESD-u (non_cross_attention) for objects and nudity, ESD-x (cross_attention) for
    styles. ESD-x-strict (cross_kv) and all come from the authors' later code."""

    rank: int = 0
    """Of factors over the group's linear maps (LoRA), everything else frozen; 0, the paper: whole tensors. Factors
    start at zero change, so they want larger steps, such as lr 1e-3."""

    strength: float = 1.0
    """eta in goal = u − eta · (c − u). 0: the target becomes the empty prompt; −1: nothing changes. The paper: 1, up
    to 3 for objects. The authors' later scripts write c − eta' · (c − u): the same goal for eta' = eta + 1."""

    erase_from: str = ""
    """Remove the target only out of this phrase ("hat" from "cowboy"): the student is then trained under f = this
    phrase, toward goal = eps(f) − strength · (c − u). Empty: the target itself is erased."""

    templates: tuple[str, ...] = ("{}",)
    """Sentences the target, or `erase_from`, is erased in. The paper: the phrase alone."""

    trajectory: Literal["teacher", "student"] = "teacher"
    """Whose sampler makes the states. student, walked anew each step, is the paper's; teacher walks a pool once."""

    pool: int = 64
    """States walked up front when trajectory is teacher; each step draws `batch` of them."""

    walk: int = 50
    """Sampler steps of a whole trajectory; each state stops at a uniformly drawn one. The paper: 50."""

    guidance_scale: float = 3.0
    """w in u + w · (c − u) along the trajectory. The paper: 3."""

    embedded_scales: tuple[float, ...] = (1.0, 3.5)
    """Scales g a guidance-distilled model is taught at, taking turns: erased at one, it may still draw the target at
    another. Without meaning where guidance is true."""

    steps: int = 200
    """Optimizer steps. The paper: 1000 at batch 1; the authors' later code: 200."""

    lr: float = 2e-5
    """Adam's step size, constant. The paper: 1e-5; the authors' later code: 5e-5 for 200 steps of ESD-x."""

    batch: int = 4
    """States per step. The paper: 1."""

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch | LowRankPatch:
        """Patch of differences, or factors for a rank, on `group` after `steps` steps."""
        student = trainable(model, self.group, rank=self.rank, rng=run.rng("factors"))
        rows = [(phrase, self.erase_from, "") for phrase, _ in request.pairs]
        texts = zip(*framed(self.templates, rows), strict=True)
        target, base, uncond = (at_scales(model.encode(side), self.embedded_scales) for side in texts)
        learner = base if self.erase_from else target

        def teach(state: State, which: Tensor) -> Goals:
            c = model.predict(state, target.take(which))
            u = model.predict(state, uncond.take(which))
            f = model.predict(state, base.take(which)) if self.erase_from else u
            return (f - self.strength * (c - u),)

        walk = Walk(prompts=learner, batch=self.batch, guidance_scale=self.guidance_scale, steps=self.walk)
        lesson = walk.lessons(model, student.view, teach, run, fresh=self.trajectory == "student", size=self.pool)

        def loss(step: int) -> Tensor:
            now = lesson(step)
            pred = student.view().predict(now.state, learner.take(now.which))
            return model.distance(pred, now.goals[0]).mean()

        fit(student, loss, run, steps=self.steps, lr=self.lr, state=())
        return student.patch()
