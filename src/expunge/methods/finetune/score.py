"""SCORE, a reconstruction: erase until a discriminator can only guess whether the concept was asked for (2025).

RECONSTRUCTION: the full text was not available to us and no official code exists. The game, its terms and every default
are our reading of the abstract of Fu et al.; nothing may be reported as "the paper's number".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Family, Generator
from expunge.ops.fit import fit
from expunge.ops.game import Game, Sides
from expunge.ops.independence import Form
from expunge.ops.pairs import Pairs
from expunge.ops.saliency import Look, Saliency, most_salient
from expunge.ops.student import Student
from expunge.ops.trajectory import Walk
from expunge.patches.weights import WeightPatch


@dataclass(frozen=True, kw_only=True)
class Score(Eraser):
    """Reconstruction: fine-tune salient weights until clean samples tell nothing of the target, and keep the rest.

    min_θ max_D  adversarial · play(D(x̂0, t)) + kept · (‖f(r) − f_0(r)‖² + uncond · ‖f("") − f_0("")‖²
    + early · ‖f(c) − f_0(c)‖² at t > turn) + direction · ‖f(c) − (n − strength · (c_0 − n))‖² at first.
    x̂0 = clean sample of the student's prediction under c at t ≤ turn of its own path; D tells it from its twin, the
    same sentence about the anchor from the same noise. At D's best, ln 2 − L(D) = I(C; x̂0) for these prompts: what is
    proved of them says nothing about others.
    """

    paper: ClassVar[str] = "arXiv:2509.12024"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    reconstruction: ClassVar[bool] = True
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"moves_the_target_more_than_what_is_retained": "An untrained toy draws nothing that a judge could tell apart."}
    )

    group: Literal["cross_attention", "non_cross_attention", "cross_kv", "all"] = "non_cross_attention"
    """What is trained, under the mask. The paper: not known."""

    share: float = 0.5
    """Share of the group's scalars that may move, the most salient for drawing the target. SalUn: 0.5; 1: no mask."""

    saliency: Saliency = "gradient"
    """|mean gradient| (SalUn), or the mean squared gradient (fisher), of the frozen model's denoising loss on its own
    pictures of the target."""

    pictures: int = 8
    """Pictures of the targets the mask is made from."""

    draws: int = 16
    """Noised batches over which the mask's gradients are averaged."""

    form: Form = "confusion"
    """confusion: −½ log D − ½ log(1 − D), stationary at independence. flipped: −log(1 − D), not stationary there."""

    adversarial: float = 0.1
    """Weight of the game. 0: no game is played, the discriminator only watches."""

    kept: float = 1.0
    """Weight of what is held in place."""

    uncond: float = 0.5
    """Weight of the unconditional prediction among it."""

    early: float = 1.0
    """Weight of the target's early states among it."""

    direction: float = 1.0
    """Weight of the directional term."""

    warm: float = 1.0
    """Share of the steps with the directional term."""

    strength: float = 0.0
    """eta in goal = n − eta · (c_0 − n), n under the twin. 0: the target becomes its twin."""

    turn: float = 0.9
    """t': what is noisier is early and kept. ANT: 0.8 for identities, 0.86 for nudity, 0.94 for styles."""

    templates: tuple[str, ...] = ("{}", "a picture of a {}", "a {} on a plain background", "a flat picture of a {}")
    """Sentences around target, anchor and retained concepts."""

    opponent_lr: float = 1e-3
    """Step size of the discriminator's Adam."""

    r1: float = 0.01
    """γ in ½ γ E ‖∇ logit‖² on samples asked for."""

    pool: int = 64
    """States of the frozen model's paths under retained sentences, walked once."""

    pairs: int = 32
    """Pairs walked by the student at a time."""

    refresh: int = 50
    """Steps after which the student walks anew."""

    walk: int = 25
    """Sampler steps of a path."""

    guidance_scale: float = 3.0
    """w in u + w · (c − u) along paths and in pictures."""

    embedded_scales: tuple[float, ...] = (1.0, 3.5)
    """Scales a guidance-distilled model is taught at, taking turns; without meaning where guidance is true."""

    steps: int = 200
    """Optimizer steps."""

    lr: float = 2e-5
    """Adam's step size, constant."""

    batch: int = 4
    """Late pairs of a step, retained states as many, early ones half as many."""

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch:
        """Patch of weight deltas on the salient scalars of `group`; logs the discriminator's cross-entropy."""
        student = Student.of(model, self.group)
        sides = Sides.of(model, request, self.templates, self.embedded_scales)
        if self.share != 1:
            look = Look(self.saliency, pictures=self.pictures, draws=self.draws, steps=self.walk)
            student.restrict(most_salient(look.scores(student, sides.texts, run), self.share))
        game = Game(
            form=self.form,
            adversarial=self.adversarial,
            kept=self.kept,
            uncond=self.uncond,
            early=self.early,
            direction=self.direction,
            warm=round(self.warm * self.steps),
            strength=self.strength,
            turn=self.turn,
            opponent_lr=self.opponent_lr,
            r1=self.r1,
            batch=self.batch,
        )
        path = Walk(prompts=sides.asked, batch=self.batch, guidance_scale=self.guidance_scale, steps=self.walk)
        pairs = Pairs(walk=path, twin=sides.twin, size=self.pairs, refresh=self.refresh)
        loss, state = game.loss(student, sides, pairs, run, pool=self.pool)
        fit(student, loss, run, steps=self.steps, lr=self.lr, state=state)
        return student.patch()
