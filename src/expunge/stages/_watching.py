"""What looks at a model while it is trained: a budget for collateral change, and previews."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from expunge.core.concept import Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.ops.collateral import Collateral
from expunge.stages import _files
from expunge.stages.sample import png

FOLDER = "preview"
EVERY = 10  # steps from one measurement of collateral change to the next
ACROSS, STEPS, GUIDANCE_SCALE = 4, 15, 4.0  # pictures in each of a preview's two rows, and how they are drawn
Show = Callable[[str, Path], None]


@dataclass
class Watching:
    """Measures collateral change against a budget, and draws targets over retained concepts, every so many steps."""

    out: Path
    request: Request
    run: Run
    collateral: Collateral | None
    budget: float
    preview: int
    show: Show
    value: float = math.nan
    """The collateral change that was measured last."""

    def __str__(self) -> str:
        return f"collateral change {self.value:.3g}, budget {self.budget:g}"

    @property
    def judges(self) -> bool:
        """Whether there is a budget."""
        return self.collateral is not None

    @property
    def every(self) -> int:
        """Steps from one look to the next, whatever it is for."""
        return math.gcd(EVERY if self.collateral else 0, self.preview)

    @torch.no_grad()
    def __call__(self, done: int, view: Generator, *, last: bool) -> bool | None:
        """Draw and measure what is due; False where the budget is spent."""
        if self.preview and done % self.preview == 0:
            self._draw(done, view)
        if self.collateral is None or (done % EVERY and not last):
            return None
        self.value = self.collateral(view)
        self.run.log("collateral", done - 1, self.value)
        return self.value <= self.budget

    def _draw(self, done: int, view: Generator) -> None:
        # explicit targets are never drawn: what should stay fills their place
        stays = [concept.phrase for concept in self.request.retain] or [""]
        targets = [concept.phrase for concept in self.request.target if concept.kind != "explicit"] or stays
        prompts = [side[i % len(side)] for side in (targets, stays) for i in range(ACROSS)]
        images = view.generate(prompts, seeds=range(len(prompts)), guidance_scale=GUIDANCE_SCALE, steps=STEPS)
        sheet = images.unflatten(0, (2, ACROSS)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        file = self.out / FOLDER / f"step-{done:06d}.png"
        file.parent.mkdir(exist_ok=True)
        _files.write_bytes(file, png(sheet))
        self.show(f"after step {done}: {', '.join(dict.fromkeys(prompts))}", file)


def unseen(text: str, file: Path) -> None:
    """Show a preview to nobody."""


def watching(
    model: Generator,
    request: Request,
    run: Run,
    out: Path,
    *,
    budget: float | None,
    preview: int,
    show: Show,
) -> Watching | None:
    """Give what watches a training; None where nothing is asked. Raises InputError for a negative `preview`."""
    if preview < 0:
        raise InputError(f"preview is {preview}; legal: 0 for none, or steps from one to the next")
    if budget is None and not preview:
        return None
    collateral = None if budget is None else Collateral.of(model, request, run)
    return Watching(out, request, run, collateral, budget or math.inf, preview, show)
