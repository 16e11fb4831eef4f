"""All but One, a reconstruction: move only the target's guidance, hold the unconditional prediction (AAAI 2024).

RECONSTRUCTION: the full text was not available to us and no official code exists. Objective, projection and every
default here are our reading of the abstract of Hong, Lee and Woo; nothing may be reported as "the paper's number".
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Family, Generator, State
from expunge.ops.fit import fit
from expunge.ops.rows import at_scales
from expunge.ops.student import trainable
from expunge.ops.surgery import surgical
from expunge.ops.trajectory import Goals, Walk, predict_each
from expunge.ops.wording import framed
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.weights import WeightPatch


@dataclass(frozen=True, kw_only=True)
class AllButOne(Eraser):
    """Reconstruction: train only the target's guidance term while the unconditional prediction is held in place.

    loss = ‖ g_student(target) − g_goal ‖² + m · ‖ eps_student("") − eps("") ‖², m = drift_weight at first,
    g(c) = eps(x_t, t, c) − eps(x_t, t, ""), and g_goal = g(anchor) of the frozen model if an alternative is
    given, −strength · g(target) if not. At zero loss the guided sample of the target is the frozen model's guided
    sample of the anchor, at every guidance scale. Our reading of the abstract, not the authors' algorithm. In flow
    models eps reads velocity; guidance-distilled ones are held to it at each of `embedded_scales`.
    """

    paper: ClassVar[str] = "arXiv:2312.12807"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    reconstruction: ClassVar[bool] = True

    group: Literal["cross_attention", "non_cross_attention", "cross_kv", "all"] = "non_cross_attention"
    """What is trained. Every choice moves the empty prompt's prediction too, so the second term is not vacuous, but for
    cross_kv where the empty prompt is encoded as zeros (SDXL)."""

    rank: int = 0
    """Of factors over the group's linear maps (LoRA), all else frozen; 0: whole tensors. Factors want a larger lr."""

    constraint: Literal["penalty", "projection", "lagrangian"] = "lagrangian"
    """How the drift is held. lagrangian: m rises by dual_lr · (drift − drift_budget) each step, never below 0. penalty:
    m stays. projection: the first gradient u loses its part against the second, u − min(0, ⟨u, v⟩) / ‖v‖² · v, then
    + m · v; m stays. Ours: lagrangian, as the drift wants a large m in the end, and the target a small one at first."""

    templates: tuple[str, ...] = ("{}",)
    """Sentences around target, alternative and retained prompts."""

    strength: float = 1.0
    """eta in g_goal = −eta · g(target), for targets without an alternative. 0: the guidance vanishes."""

    drift_weight: float = 1.0
    """m at the first step. 0: the unconditional prediction is free (penalty only). Ours: 1."""

    grad_through_uncond: bool = True
    """Whether eps_student("") inside g carries gradient. Off, the first term is no gradient of anything: the
    conditional branch chases an unconditional one that shared weights drag along; on toy U-Nets, more drift."""

    retain_weight: float = 1.0
    """Weight of ‖ g_student(r) − g(r) ‖² at the target's states, retained prompts r taking turns; 0 leaves it out."""

    drift_budget: float = 1e-4
    """Mean squared drift the multiplier aims at (lagrangian only)."""

    dual_lr: float = 100.0
    """Rise of m per unit of excess drift and step (lagrangian only). 400 holds `emoji-unet` better still."""

    trajectory: Literal["teacher", "student"] = "teacher"
    """Whose sampler makes the states: a pool walked once by the frozen model, or the student anew each step."""

    pool: int = 64
    """States walked up front when trajectory is teacher; each step draws `batch` of them."""

    walk: int = 50
    """Sampler steps of a whole trajectory; each state stops at a uniformly drawn one."""

    guidance_scale: float = 3.0
    """w in u + w · (c − u) along the trajectory."""

    embedded_scales: tuple[float, ...] = (1.0, 3.5)
    """Scales a guidance-distilled model is taught at, taking turns; without meaning where guidance is true."""

    steps: int = 150
    """Optimizer steps."""

    lr: float = 2e-5
    """Adam's step size, constant."""

    batch: int = 4
    """States per step."""

    @property
    def retains(self) -> bool:
        """Whether the retained term has any weight."""
        return self.retain_weight != 0

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch | LowRankPatch:
        """Patch of differences, or factors, on `group`; logs the drift of the unconditional prediction every step."""
        student = trainable(model, self.group, rank=self.rank, rng=run.rng("factors"))
        kept = [prompt for concept in request.retain for prompt in concept.prompts] if self.retains else []
        plan = framed(self.templates, [(*pair, other) for pair in request.pairs for other in kept or [""]])
        texts = zip(*((t, a or t, r, "") for t, a, r in plan), strict=True)  # a or t: whose guidance t is given
        target, heading, other, uncond = (at_scales(model.encode(side), self.embedded_scales) for side in texts)
        scale = torch.tensor([1.0 if a else -self.strength for _, a, _ in plan]).repeat(len(target) // len(plan))
        held = (other,) if kept else ()

        def teach(state: State, which: Tensor) -> Goals:
            u, h, *r = predict_each(model, state, [cond.take(which) for cond in (uncond, heading, *held)])
            return u, scale[which].to(u).view(-1, *[1] * (u.ndim - 1)) * (h - u), *(p - u for p in r)

        walk = Walk(prompts=target, batch=self.batch, guidance_scale=self.guidance_scale, steps=self.walk)
        lesson = walk.lessons(model, student.view, teach, run, fresh=self.trajectory == "student", size=self.pool)
        multiplier = torch.tensor(self.drift_weight, dtype=torch.float64)

        def loss(step: int) -> Tensor:
            now = lesson(step)
            preds = predict_each(student.view(), now.state, [c.take(now.which) for c in (uncond, target, *held)])
            wish, drift = self.terms(model, preds, now.goals)
            for name, term in (("wish", wish), ("drift", drift)):
                run.log(name, step // run.parts, term.item())
            if self.constraint == "projection":
                return surgical(wish, drift, student.parameters, self.drift_weight)
            total = wish + multiplier.item() * drift
            if self.constraint == "lagrangian":
                multiplier.add_(self.dual_lr * (drift.item() - self.drift_budget)).clamp_(min=0)
            return total

        fit(student, loss, run, steps=self.steps, lr=self.lr, state=(multiplier,))
        return student.patch()

    def terms(self, model: Generator, preds: Goals, goals: Goals) -> tuple[Tensor, Tensor]:
        """Means over states of ‖g_student − g_goal‖² (the retained term, weighted, included) and of the drift.

        preds: the student's predictions under "", the target and, if retained, another; goals: the frozen model's
        prediction under "", then one guidance goal for each of the others.
        """
        u, c, *others = preds
        inner = u if self.grad_through_uncond else u.detach()
        wish = model.distance(c - inner, goals[1]).mean()
        for pred, goal in zip(others, goals[2:], strict=True):
            wish = wish + self.retain_weight * model.distance(pred - inner, goal).mean()
        return wish, model.distance(u, goals[0]).mean()
