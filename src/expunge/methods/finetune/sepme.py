"""SepME: decorrelate a concept's guidance by a weight shift that all other concepts do not feel (Zhao et al., 2024)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.decoupling import Settling, ShiftStudent, balance, correlation, free_basis
from expunge.ops.fit import accumulate, fit
from expunge.ops.limits import at_least
from expunge.ops.rows import encode_many, prompt_rows
from expunge.ops.scenes import Scenes
from expunge.ops.wording import sentences
from expunge.patches.weights import WeightPatch

_LEAST = 1e-4  # where no row of a target has a larger share off what is held, rounding is all that could be learned


@dataclass(frozen=True, kw_only=True)
class SepME(Eraser):
    """Learn one shift of keys and values per concept, in directions that no other concept's text has a part in.

    dW_k = w_k S_k for every layer, S_k an orthonormal basis of {s : s · e = 0 for every held row e}: those of the empty
    prompt, of every other target and of what is retained. So dW_k e = 0 there, whatever w_k "out f" is, shifts add up
    without meeting, and any of them can be taken off again: give each concept an artifact, the others as retained.
    loss = mean(r · r*) + penalty / M · Σ_layers Σ |dW_k|, r = eps(z_t, t, c) − eps(z_t, t, "") of the shifted, r* of
    the frozen model, z_t its noised pictures of c. From mean(r*²) it falls to 0, where both are decorrelated, and would
    fall on: after ten steps, training ends once m ← 0.9 m + 0.1 mean(r · r*) is below `threshold`.
    Source: arXiv:2402.05947, later version (SRS-ME), which names no destination. Held are the rows of these texts in
    `templates`, not the concept in every sentence. SDXL's pooled text is untouched.
    """

    paper: ClassVar[str] = "arXiv:2402.05947"
    families: ClassVar[frozenset[Family]] = frozenset({"unet"})
    uses_anchor: ClassVar[bool] = False

    order: Literal["each", "joint"] = "each"
    """each: one concept after the other (SRS-ME). joint: all in one loop (SRS-ME†), loss = Σ_i eta_i mean(r_i · r_i*) +
    …, eta_i = max_k |mean(r_k · r_k*)| / |mean(r_i · r_i*)|."""

    rows: Literal["window", "words"] = "window"
    """Rows of other texts that are held. window: the paper's, padding too. words: opening token to first closing token,
    which leaves more room, and padding to move."""

    tolerance: float = 1e-3
    """Directions also count as free if their singular value among the held rows is at most this share of the largest.
    Ours. 0: exact, the paper's, with room for nine other concepts at width 768 and 77 rows, for five at 192 and 32."""

    templates: tuple[str, ...] = ("{}",)
    """Sentences about targets, which are drawn, and other concepts, which are held. The paper: phrases alone."""

    watermarks: tuple[str, ...] = ()
    """More texts held as they are, as the paper holds a watermark's."""

    against: str = ""
    """The text whose prediction is subtracted in r: empty, or the target's phrase without what is to go."""

    pictures: int = 16
    """Pictures of each concept, drawn by the frozen model, taking turns; at least one of each sentence."""

    guidance_scale: float = 7.5
    """w in u + w · (c − u) of these pictures."""

    walk: int = 30
    """Sampler steps of these pictures."""

    steps: int = 200
    """Optimizer steps at most, of each concept, chosen on emoji-unet. The paper: 1000."""

    threshold: float = 1e-4
    """tau. The paper: 1e-4; 0 erases more. Compare mean(r*²), which the log calls "correlation" at step 0."""

    penalty: float = 1e-6
    """lam. The paper: 1e-6."""

    lr: float = 1e-3
    """Adam's step size on w, chosen on emoji-unet. The paper: 0.1 where S has norm 1e-4, which is 1e-5 here."""

    batch: int = 1
    """Noised pictures of each concept per step. The paper: 1."""

    gradients: Literal["fresh", "accumulated"] = "fresh"
    """accumulated: the code's, which never sets gradients to zero, so that each step takes the sum of all so far."""

    def erase(self, model: Generator, request: Request, run: Run) -> WeightPatch:
        """Patch of the sum of all concepts' shifts on every key and value layer."""
        if model.family not in self.families:
            raise InputError(f"sepme shifts a U-Net's keys and values; {model.name!r} is {model.family!r}, legal: unet")
        at_least(self, {"steps": 1, "pictures": 1, "batch": 1, "penalty": 0})
        pairs = [(concept, self._room(model, request, concept)) for concept in request.target]
        groups = [[pair] for pair in pairs] if self.order == "each" else [pairs]
        found = [self._learned(model, group, run).deltas for group in groups]
        paths = dict.fromkeys(path for deltas in found for path in deltas)
        shifts = {path: [deltas[path] for deltas in found if path in deltas] for path in paths}
        return WeightPatch({path: torch.stack(parts).sum(0) for path, parts in shifts.items()})

    def _room(self, model: Generator, request: Request, concept: Concept) -> Float[Tensor, "f d"]:
        """S_k; other texts are sorted, so that it does not depend on their order or on which of them are targets."""
        others = [other for other in (*request.target, *request.retain) if other is not concept]
        lines = sentences(self.templates, [prompt for other in others for prompt in other.prompts])
        texts = sorted({"", *self.watermarks, *(line.text for line in lines)})
        basis = free_basis(torch.cat(prompt_rows(encode_many(model, texts), "tokens", self.rows)), self.tolerance)
        own = model.encode([line.text for line in sentences(self.templates, concept.prompts)]).tokens.double()
        share = ((own @ basis.T).norm(dim=-1) / own.norm(dim=-1)).max() if len(basis) else torch.zeros(())
        if not share >= _LEAST:
            left = f"{len(basis)} of {own.shape[-1]} directions; retain less, or set rows=words or a higher tolerance"
            raise InputError(f"concept {concept.name!r} has no part off the rows of {len(texts)} other texts: {left}")
        return basis

    def _learned(self, model: Generator, group: Sequence[tuple[Concept, Tensor]], run: Run) -> WeightPatch:
        terms = [self._term(model, concept, run) for concept, _ in group]
        settling = [Settling(self.threshold) for _ in group]
        student = ShiftStudent(model, [site.path for site in model.sites("text_in")], [basis for _, basis in group])
        state = [one.state for one in settling]
        state += accumulate(student.parameters) if self.gradients == "accumulated" else []

        def loss(step: int) -> Tensor:
            seen = torch.stack([term(student.view(), step) for term in terms])
            for (concept, _), value, one in zip(group, seen.tolist(), settling, strict=True):
                run.log(f"correlation {concept.name}", step // run.parts, value)
                one.see(value)
            sizes = torch.stack([shift.abs().sum() for shift in student.shifts().values()])
            return (balance(seen) * seen).sum() + self.penalty * sizes.mean()

        own, settled = run.apart("terms", *(c.name for c, _ in group)), lambda: all(one.done for one in settling)
        fit(student, loss, own, steps=self.steps, lr=self.lr, until=settled, state=state)
        return student.patch()

    def _term(self, model: Generator, concept: Concept, run: Run) -> Callable[[Generator, int], Tensor]:
        """Give mean(r · r*) of a view at a step, on a random stream of the concept's own."""
        own = run.apart("concept", concept.name)
        lines = sentences(self.templates, concept.prompts)
        lines = [lines[i % len(lines)] for i in range(max(self.pictures, len(lines)))]
        scenes = Scenes.drawn(model, lines, own, guidance_scale=self.guidance_scale, steps=self.walk)
        plain = model.encode([self.against])

        def term(view: Generator, step: int) -> Tensor:
            index = (step * self.batch + torch.arange(self.batch)) % len(lines)
            state = model.noised(scenes.clean[index], rng=own.rng("noise", step))
            return correlation(view, model, state, scenes.cond.take(index), plain.take(0 * index))

        return term
