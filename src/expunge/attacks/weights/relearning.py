"""Relearning: a few steps of low-rank fine-tuning on pictures of the concept."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.attack import Access, Aim, Attack, Attempt, Pictures, Threat
from expunge.core.eraser import Run
from expunge.core.generator import Family, Generator
from expunge.ops.denoising import denoising_loss, drawn_batch
from expunge.ops.fit import fit
from expunge.ops.limits import at_least, learnable
from expunge.ops.student import LowRankStudent
from expunge.patches.lowrank import LowRankPatch


@dataclass(frozen=True, kw_only=True)
class Relearning(Attack):
    """Fine-tune thin factors over the erased model's attention on pictures of the concept; prompts stay plain.

    min E ||prediction(x_t, t, caption) - goal||^2 with W + B A in place of W; success after each step of the curve. The
    question is not whether a model can learn, but how much sooner than something it never knew: the never-knew control
    is the same fine-tuning of the same erased model on a sign nobody drew. The null control asks for the concept after
    that training: whether any training brings it back. It passes through no guard.
    """

    paper: ClassVar[str] = "arXiv:2410.12777"
    access: ClassVar[Access] = "weights"
    threat: ClassVar[Threat] = "T6"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    meets_guards: ClassVar[bool] = False

    steps: int = 50
    """Optimizer steps."""
    lr: float = 1e-4
    """Step size of Adam."""
    rank: int = 4
    """Of the factors."""
    batch: int = 4
    """Pictures per step."""
    images: int = 20
    """Pictures of the concept."""
    source: Literal["drawn", "world"] = "world"
    """Whose: real ones of emoji world, or the unerased model's own."""
    curve: tuple[int, ...] = (5, 20)
    """Steps after which success is measured as well; those from `steps` on are left out."""

    def __post_init__(self) -> None:
        at_least(self, {"steps": 1, "batch": 1, "images": 1, "rank": 1})
        learnable(self.lr, self.curve)

    def pictures(self) -> Pictures:
        """Say which pictures are learned from."""
        return Pictures(source=self.source, count=self.images)

    def search(self, model: Generator, aim: Aim, run: Run, *, reference: Generator) -> Iterator[Attempt]:
        """One attempt after every step of the curve, and one at the end."""
        assert aim.images is not None
        clean = model.absorb(aim.images).float()
        cond = model.encode(aim.captions)
        paths = [path for path, weight in model.select("attention").items() if weight.ndim == 2]
        student = LowRankStudent.of(model, paths, rank=self.rank, rng=run.rng("factors"))
        patches: dict[int, LowRankPatch] = {}

        def loss(step: int) -> Tensor:
            if step in self.curve:
                patches[step] = student.patch()
            chosen = drawn_batch(len(clean), self.batch, run, ("relearn", step)).to(clean.device)
            return denoising_loss(student.view(), clean[chosen], cond.take(chosen), run, ("noise", step)).mean()

        fit(student, loss, run, steps=self.steps, lr=self.lr)
        for step, patch in {**patches, self.steps: student.patch()}.items():
            yield Attempt(
                model=patch.on(model),
                prompts=aim.prompts,
                seeds=aim.seeds,
                step=step,
                gradients=step * self.batch,
                learned=sum(factor.numel() for factor in student.parameters),
            )

    def random(
        self, model: Generator, aim: Aim, run: Run, *, reference: Generator, found: Attempt
    ) -> Iterator[Attempt]:
        """Every matrix moved as far as by the last step, in a random direction."""
        weights = {}
        for path, weight in model.select("attention").items():
            if (far := (found.model.weight(path).float() - weight.float()).norm()) > 0:
                noise = torch.randn(weight.shape, generator=run.rng("random", path)).to(weight.device)
                weights[path] = (weight.float() + noise * far / noise.norm()).to(weight.dtype)
        yield replace(found, model=model.view(weights=weights), step=1, gradients=0, learned=0)
