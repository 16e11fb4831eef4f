"""Soft-token inversion (circumventing concept erasure): a word learned on the erased model, from pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.attack import Access, Aim, Attack, Attempt, Pictures, Threat
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.denoising import denoising_loss, drawn_batch
from expunge.ops.limits import at_least, learnable
from expunge.ops.softword import Slot, absent, slots, with_word


@dataclass(frozen=True, kw_only=True)
class SoftToken(Attack):
    """Learn the input embedding of a word that meant nothing, with the erased model's ordinary denoising loss.

    min_v E ||prediction(x_t, t, encode("… [v] …")) - goal||^2 over pictures of the concept; one row per token of the
    word and text encoder, all weights frozen. Starts at the concept's own last word. A long training can teach a row
    what the model never knew: read it beside the never-knew control. It passes through no guard.
    """

    paper: ClassVar[str] = "arXiv:2308.01508"
    access: ClassVar[Access] = "embedding"
    threat: ClassVar[Threat] = "T4"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    knows_original: ClassVar[bool] = True
    meets_guards: ClassVar[bool] = False

    steps: int = 1000
    """Optimizer steps."""
    lr: float = 5e-3
    """Step size of AdamW, the effective one; weight decay 0.01."""
    batch: int = 4
    """Pictures per step."""
    images: int = 16
    """Pictures of the concept."""
    source: Literal["drawn", "world"] = "drawn"
    """Whose: the unerased model's own, or real ones of emoji world."""
    curve: tuple[int, ...] = (50, 200)
    """Steps after which success is measured as well; those from `steps` on are left out."""
    word: str = "x"
    """The word that is overwritten; no prompt may hold it."""

    def __post_init__(self) -> None:
        at_least(self, {"steps": 1, "batch": 1, "images": 1})
        learnable(self.lr, self.curve)

    def pictures(self) -> Pictures:
        """Say which pictures are learned from."""
        return Pictures(source=self.source, count=self.images)

    def search(self, model: Generator, aim: Aim, run: Run, *, reference: Generator) -> Iterator[Attempt]:
        """One attempt after every step of the curve, and one at the end."""
        assert aim.images is not None
        places = slots(model, self.word)
        prompts, captions = (
            tuple(aim.renamed(text, self.word) for text in texts) for texts in (aim.prompts, aim.captions)
        )
        absent(model, places, [aim.renamed(text, "") for text in (*aim.prompts, *aim.captions)], self.word)
        clean = model.absorb(aim.images).float()
        rows = [_start(model, slot, aim.concept.phrase) for slot in places]
        optimizer = torch.optim.AdamW(rows, lr=self.lr, weight_decay=1e-2)
        stops = {step for step in self.curve if step < self.steps} | {self.steps}
        for step in range(1, self.steps + 1):
            with torch.enable_grad():
                chosen = drawn_batch(len(clean), self.batch, run, ("soft", step))
                taught = with_word(model, places, rows)
                cond = taught.encode([captions[index] for index in chosen.tolist()])
                loss = denoising_loss(taught, clean[chosen], cond, run, ("soft noise", step)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            run.progress("soft token", step, self.steps)
            if not bool(loss.isfinite()):
                raise InputError(f"the loss is {loss.item()} at step {step}; lower lr (now {self.lr})")
            if step in stops:
                yield Attempt(
                    model=with_word(model, places, [row.detach().clone() for row in rows]),
                    prompts=prompts,
                    seeds=aim.seeds,
                    step=step,
                    gradients=step * self.batch,
                    learned=sum(row.numel() for row in rows),
                    facts={"effective_lr": self.lr, "last_loss": loss.item()},
                )

    def random(
        self, model: Generator, aim: Aim, run: Run, *, reference: Generator, found: Attempt
    ) -> Iterator[Attempt]:
        """A row drawn from the normal distribution with the vocabulary's mean and spread, not learned."""
        places = slots(model, self.word)
        rows = [_drawn(slot, run) for slot in places]
        prompts = tuple(aim.renamed(prompt, self.word) for prompt in aim.prompts)
        yield Attempt(model=with_word(model, places, rows), prompts=prompts, seeds=aim.seeds, step=1)


def _start(model: Generator, slot: Slot, phrase: str) -> Float[Tensor, "k d"]:
    own = next(place.ids for place in slots(model, phrase) if place.path == slot.path)
    return slot.table[own[-1]].float().repeat(len(slot.ids), 1).requires_grad_()


def _drawn(slot: Slot, run: Run) -> Float[Tensor, "k d"]:
    table = slot.table.float()
    noise = torch.randn(len(slot.ids), table.shape[1], generator=run.rng("random", slot.path)).to(table)
    return table.mean(0) + table.std(0) * noise
