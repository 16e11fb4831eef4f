"""CE-SDWV, a reconstruction: take a concept's components out of the prompt's embeddings (Tu et al., 2025).

RECONSTRUCTION: only the abstract and the stages' names were available to us, and no code. Rows, gate, losses and every
default are our reading; nothing may be reported as "the paper's number".
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator, State
from expunge.ops.fit import fit
from expunge.ops.limits import at_least, naming
from expunge.ops.suppress import Component, Suppressor, TokenCorrection, added, component
from expunge.ops.surgery import orthogonal, surgical
from expunge.ops.trajectory import Lesson, Walk
from expunge.patches.guard import GuardPatch

Texts = list[list[str]]


@dataclass(frozen=True, kw_only=True)
class CESDWV(Eraser):
    """Reconstruction: suppress a concept's principal components in the encoded prompt; no weight changes.

    1. Vocabulary: the target's phrases in `templates`, each faced by its anchor; Y holds the differences of their rows,
    Y = U S Vᵀ, and B (r rows) keeps the leading directions with a share `energy` of the squares. Words, closing rows
    and SDXL's pooled text have a basis each.
    2. Suppression of a prompt's rows e, never of its opening one: e' = e − strength · alpha · (e − m) Bᵀ B. alpha in
    [0, 1] is one number a prompt and grows with its evidence, the largest cosine of its words, or of its closing rows,
    seen from the anchor's, with the mean difference: 0 up to that of what is retained (or the anchor), 1 from `reach`
    on; of the two the larger alpha counts.
    3. A correction D "l d" is added, e' + alpha · D: it makes the frozen network predict under the suppressed target
    what it predicts under the anchor, by a gradient u − ⟨u, v⟩ / ‖v‖² · v, v the gradient of what D, added to retained
    prompts, would do to them. With the guard gone, the model is the old one: whoever holds it can remove it.
    """

    paper: ClassVar[str] = "arXiv:2501.15562"
    families: ClassVar[frozenset[Family]] = frozenset({"unet"})
    reconstruction: ClassVar[bool] = True

    strength: float = 1.0
    """s in e' = e − s · alpha · (e − m) Bᵀ B. 0: nothing changes; 1: nothing of the components is left."""

    energy: float = 0.98
    """tau: the share of the differences' squares that the components hold, (0, 1]; chosen on emoji-unet."""

    words: tuple[str, ...] = ()
    """More of the target's vocabulary, explicit or implicit; with several targets it belongs to the first."""

    reach: float = 0.5
    """Where alpha becomes 1: high = low + reach · (median evidence in the vocabulary − low), (0, 1]."""

    templates: tuple[str, ...] = ("{}", "a {}", "a photo of {}", "a picture of a {}", "a small {} on a table")
    """Sentences the vocabulary is read in, each with one {}."""

    goal: Literal["anchor", "zero"] = "anchor"
    """m: anchor, the mean of the anchor's rows, whose coordinates remain. zero: 0, so that e' Bᵀ = 0 at strength 1."""

    gate: Literal["adaptive", "always"] = "adaptive"
    """always: alpha is 1 for every prompt, an oblivious projection."""

    steps: int = 40
    """Adam steps that fit D; 0: no stage 3."""

    lr: float = 0.01
    """Adam's step size on D."""

    retain_weight: float = 1.0
    """b in ‖ε(e' + D) − ε(anchor)‖² + b · ‖ε(p + D) − ε(p)‖², p retained; its gradient is out of the first at any b."""

    guidance_scale: float = 4.0
    """Guidance of the walks that states are taken from."""

    walk: int = 25
    """Sampler steps of a whole walk."""

    pool: int = 32
    """States walked once, by the frozen model, for each of the two losses; at least one per text."""

    batch: int = 4
    """States per step."""

    def erase(self, model: Generator, request: Request, run: Run) -> GuardPatch:
        """Guard that remembers bases, gates and the correction."""
        if model.family not in self.families:
            raise InputError(f"ce_sdwv reads a U-Net's prompt; {model.name!r} is {model.family!r}, legal: unet")
        at_least(self, {"steps": 0})
        for form in self.templates or ("",):
            if form.count("{}") != 1:
                raise InputError(f"template is {form!r}; legal: with one {{}}, as in 'a photo of {{}}'")
        facing = [self._texts(index, request) for index in range(len(request.target))]
        kept = [form.format(p) for c in request.retain for p in c.prompts for form in self.templates]
        with naming(request.target):
            found = [component(model, *side, kept or side[1], self.energy, self.reach, self.goal) for side in facing]
        none = torch.zeros_like(model.encode([""]).tokens[0])
        guard = Suppressor(tuple(found), self.strength, self.gate == "adaptive", none)
        if self.steps and self.strength:
            sides = [[text for side in facing for text in side[part]] for part in (0, 1)]
            guard = self._adapted(model, guard, sides, kept or sides[1], run)
        return self._patch(guard)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> GuardPatch:
        """Rebuild the guard from what it stored."""
        config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()}
        method = cls(**config)
        found = tuple(Component.restored(tensors, index) for index in range(meta["concepts"]))
        return method._patch(Suppressor(found, method.strength, method.gate == "adaptive", tensors["correction"]))

    def _texts(self, index: int, request: Request) -> tuple[list[str], list[str]]:
        pairs = list(Request(target=(request.target[index],), anchor=(request.anchor[index],)).pairs)
        pairs += [(word, pairs[0][1]) for word in self.words if index == 0]
        faced = [(form.format(t), form.format(a) if a else "") for t, a in pairs for form in self.templates]
        return [t for t, _ in faced], [a for _, a in faced]

    def _adapted(self, model: Generator, guard: Suppressor, sides: Texts, kept: list[str], run: Run) -> Suppressor:
        target, anchor, plain = (model.encode(texts) for texts in (*sides, kept))
        gone = guard.condition(target)
        learner, whole = TokenCorrection(model, target), torch.ones(self.batch, dtype=torch.float64)
        lessons = []
        for prompts, goals in ((target, anchor), (plain, plain)):
            walk = Walk(prompts=prompts, batch=self.batch, guidance_scale=self.guidance_scale, steps=self.walk)

            def teach(state: State, which: Tensor, goals: Condition = goals) -> tuple[Tensor]:
                return (model.predict(state, goals.take(which)),)

            lessons.append(walk.pooled(model, teach, run, size=max(self.pool, len(prompts))))

        def miss(seen: Lesson, rows: Condition) -> Tensor:
            pred = model.predict(seen.state, added(rows.take(seen.which), learner.rows, whole))
            return model.distance(pred, seen.goals[0]).mean()

        def loss(step: int) -> Tensor:
            wish, held = (miss(draw(step), rows) for draw, rows in zip(lessons, (gone, plain), strict=True))
            return surgical(wish, held, learner.parameters, self.retain_weight, project=orthogonal)

        fit(learner, loss, run, steps=self.steps, lr=self.lr, state=())
        return replace(guard, correction=learner.rows.detach())

    def _patch(self, guard: Suppressor) -> GuardPatch:
        return GuardPatch(guard, guard.tensors(), {"config": asdict(self), "concepts": len(guard.components)})
