"""Erasure as a game: a student that keeps its paths everywhere but where a discriminator still reads the concept.

A reconstruction shared by SCORE (arXiv:2509.12024) and FADE (arXiv:2507.12283), whose full texts were not available:
the terms, their weights and the rules of play are ours, chosen so that what the abstracts say is true of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State
from expunge.ops.guidance import guide
from expunge.ops.independence import Discriminator, Form, Opponent, confusion, flipped, information
from expunge.ops.pairs import Pair, Pairs
from expunge.ops.rows import at_scales, encode_many, join_states
from expunge.ops.student import Learner
from expunge.ops.trajectory import Goals, Lesson, predict_each
from expunge.ops.wording import sentences

PLAYS = {"confusion": confusion, "flipped": flipped}


@dataclass(frozen=True)
class Sides:
    """Prompts of a game, encoded: sentences about the targets, their twins, and what is kept.

    A twin is the same sentence about the anchor, or without the phrase where there is none. texts: the sentences about
    the targets. head[i]: the target that row i is about.
    """

    texts: tuple[str, ...]
    asked: Condition
    twin: Condition
    head: Int[Tensor, "n"]
    kept: Condition
    uncond: Condition

    @classmethod
    def of(cls, model: Generator, request: Request, templates: Sequence[str], scales: Sequence[float]) -> "Sides":
        """Put every phrase of target, anchor and retained concepts into every template; nothing retained keeps ""."""
        rows = []
        for head, (target, anchor) in enumerate(zip(request.target, request.anchor, strict=True)):
            one = Request(target=(target,), anchor=(anchor,))
            for phrase, other in one.pairs:
                rows += [(line.text, line.about(other).text, head) for line in sentences(templates, [phrase])]
        asked, twin, heads = zip(*rows, strict=True)
        phrases = [phrase for concept in request.retain for phrase in concept.prompts]
        kept = [line.text for line in sentences(templates, phrases)] or [""]
        encoded = [at_scales(encode_many(model, side), scales) for side in (asked, twin, kept, [""] * len(kept))]
        turns = len(encoded[0]) // len(rows)
        return cls(asked, encoded[0], encoded[1], torch.tensor(heads).repeat(turns), encoded[2], encoded[3])


@dataclass(frozen=True, kw_only=True)
class Game:
    """L = adversarial · play(D(x̂0)) + kept · (retained + uncond · unconditional + early · early) + direction · L_dir.

    x̂0 = the clean sample implied by the student's prediction at a late state of its own path; D's pair is the same of
    the twin, from the same noise. retained, unconditional, early: ‖f − f_0‖² under retained sentences and "" on the
    frozen model's paths, and under the target's before `turn`. L_dir = ‖f(target) − (n − strength · (c − n))‖², n and c
    the frozen model's predictions under twin and target, in the first `warm` share of the steps.
    The number of steps ends the game, not a discriminator whose cross-entropy has come up to ln 2: one that has not
    learned yet is there as well, and what can be guessed is for a fresh one to say, after the training (`certify`).
    """

    form: Form
    adversarial: float
    kept: float
    early: float
    turn: float
    """t': states noisier than this are early, where the layout is made."""
    opponent_lr: float
    r1: float
    batch: int
    uncond: float = 0.0
    direction: float = 0.0
    warm: int = 0
    """Steps with the directional term."""
    strength: float = 0.0

    def loss(
        self, student: Learner, sides: Sides, pairs: Pairs, run: Run, *, pool: int
    ) -> tuple[Callable[[int], Float[Tensor, ""]], list[Tensor]]:
        """The loss of a step, and what it changes in place from step to step.

        Logs the discriminator's cross-entropy, what it proves of I(C; X), and the three parts. What is kept is
        walked as the pairs are.
        """
        model = student.model
        drawn = pairs.walked(student.view, self._directions(model, sides), run)
        walk = replace(pairs.walk, prompts=sides.kept)
        lesson = walk.pooled(model, self._preserved(model, sides), run, size=max(pool, len(sides.kept)))
        channels, side = drawn(0).state.x.shape[1:3]
        heads = int(sides.head.max()) + 1
        net = Discriminator(channels, side, heads, run.rng("discriminator")).to(student.parameters[0].device)
        opponent = Opponent(net, lr=self.opponent_lr, r1=self.r1, average=run.average)

        def loss(n: int) -> Tensor:
            step = n // run.parts
            late, early = self._split(drawn(step), run.rng("late", n))
            now = lesson(n)
            preds = self._ask(student.view(), sides, late, early, now)
            game = self._play(opponent, student, sides, late, preds[0], run, step)
            held = self._held(model, preds[1:], early, now)
            toward = guide(late.goals[0], late.goals[1], -self.strength)
            run.log("kept", step, held.item())
            total = self.adversarial * game + self.kept * held
            if not self.direction or step >= self.warm:
                return total
            directed = model.distance(preds[0], toward).mean()
            run.log("direction", step, directed.item())
            return total + self.direction * directed

        return loss, [*drawn.state, *opponent.state]

    def _directions(self, model: Generator, sides: Sides) -> Callable[[State, Tensor], Goals]:
        return lambda state, which: predict_each(model, state, [sides.twin.take(which), sides.asked.take(which)])

    def _preserved(self, model: Generator, sides: Sides) -> Callable[[State, Tensor], Goals]:
        return lambda state, which: predict_each(model, state, [sides.kept.take(which), sides.uncond.take(which)])

    def _split(self, pool: Pair, rng: torch.Generator) -> tuple[Pair, Pair | None]:
        """Draw `batch` late pairs and half as many early ones, the latter None where there are none."""
        assert pool.state.t is not None
        clean = pool.state.t.cpu() <= self.turn
        if not clean.any():
            raise InputError(f"turn is {self.turn}; no state of the pool is that clean; raise it or pairs")
        late = pool.take(_some(clean, self.batch, rng))
        if not self.early or clean.all():
            return late, None
        return late, pool.take(_some(~clean, max(1, self.batch // 2), rng))

    def _ask(self, view: Generator, sides: Sides, late: Pair, early: Pair | None, now: Lesson) -> list[Tensor]:
        """Every prediction with gradient in one call: late, retained, unconditional, and early if there are any."""
        rows = [
            (late.state, sides.asked.take(late.which)),
            (now.state, sides.kept.take(now.which)),
            (now.state, sides.uncond.take(now.which)),
        ]
        if early is not None:
            rows.append((early.state, sides.asked.take(early.which)))
        pred = view.predict(join_states([state for state, _ in rows]), Condition.cat([cond for _, cond in rows]))
        return list(pred.split([len(state.x) for state, _ in rows]))

    def _play(
        self, opponent: Opponent, student: Learner, sides: Sides, late: Pair, pred: Tensor, run: Run, step: int
    ) -> Float[Tensor, ""]:
        """Teach the discriminator on this pair, then ask it: the adversarial term."""
        model, head = student.model, sides.head[late.which].to(pred.device)
        assert late.state.t is not None
        clean = model.as_clean(late.state, pred)
        with torch.no_grad():
            other = model.as_clean(late.twin, student.view().predict(late.twin, sides.twin.take(late.which)))
        told = opponent.learn(clean, other, late.state.t, head)
        game = PLAYS[self.form](opponent.logit(clean, late.state.t, head)).mean()
        run.log("discriminator", step, told)
        run.log("information", step, information(told))
        run.log("adversarial", step, game.item())
        return game

    def _held(self, model: Generator, preds: list[Tensor], early: Pair | None, now: Lesson) -> Float[Tensor, ""]:
        total = model.distance(preds[0], now.goals[0]).mean()
        total = total + self.uncond * model.distance(preds[1], now.goals[1]).mean()
        if early is not None:
            total = total + self.early * model.distance(preds[2], early.goals[1]).mean()
        return total


def _some(marked: Tensor, n: int, rng: torch.Generator) -> Int[Tensor, "n"]:
    places = marked.nonzero()[:, 0]
    return places[torch.randint(len(places), (n,), generator=rng)]
