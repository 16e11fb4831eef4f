"""Which prompts a method asks about: its own code is run without weights, and what it has encoded is written down."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.patch import Patch
from expunge.models._denoiser import Denoiser
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.skeleton import bare
from expunge.models.unet import UNetGenerator
from expunge.stages._rehearsal import Rehearsal


@dataclass(frozen=True)
class Listed:
    """Stands before a model's text encoders and keeps a list of what they are asked, each prompt once."""

    model: Denoiser
    prompts: dict[str, None] = field(default_factory=dict)

    def encode(self, prompts: Sequence[str], name: str) -> Condition:
        """Note prompts, and encode them."""
        self.prompts.update(dict.fromkeys(prompts))
        return self.model.encode(prompts)


def without_encoders(model: Generator, eraser: Eraser, request: Request, run: Run, method: str) -> Generator:
    """Give a model that keeps what an erasure will ask of its text encoders, and not the encoders.

    Beside that it knows the words of the request, for previews and budgets. Raises InputError for a family without text
    encoders to part with, and for a method that cannot be rehearsed.
    """
    if not isinstance(model, UNetGenerator | MMDiTGenerator):
        raise InputError(f"{model.name!r} is of family {model.family!r}; text encoders are dropped in unet, mmdit")
    skeleton = bare(model)
    listed = Listed(skeleton)
    view = copy.copy(skeleton)
    view.texts = listed
    with Rehearsal(skeleton.network).running():
        rehearsed(brief(eraser), view, request, Run(seed=run.seed, accumulate=run.parts), method)
    words = [p for c in (*request.target, *request.anchor, *request.retain) for p in (c.prompts if c else ())]
    return model.without_encoders([*listed.prompts, *words])


def rehearsed(eraser: Eraser, base: Generator, request: Request, run: Run, method: str) -> Patch:
    """Run a method on a model without weights; raises InputError where it asks for numbers there are none of."""
    try:
        return eraser.erase(base, request, run)
    except RuntimeError as error:  # torch's, of tensors without numbers
        raise InputError(f"method {method!r} asks for numbers that a model without weights has not: {error}") from None


def brief(eraser: Eraser) -> Eraser:
    """The same eraser with its repetitions cut: what it holds at once, and asks about, stays the same."""
    named = {field.name for field in dataclasses.fields(eraser)}
    cuts = {name: min(least, getattr(eraser, name)) for name, least in eraser.brief.items() if name in named}
    return dataclasses.replace(eraser, **cuts)
