"""Flow matching on a model's own pictures: what keeps a trained model where it was."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.ops.wording import Wording

CHUNK = 8  # pictures drawn together: bounds memory, changes no result's law


@torch.no_grad()
def own_latents(model: Generator, texts: Sequence[str], run: Run, *, steps: int) -> Float[Tensor, "b c h w"]:
    """Latents of pictures a model draws at guidance scale 1, in float32.

    At that scale they come from the very distribution whose flow is the model's prediction under the text, so that
    flow matching on them asks a good model for nothing new; larger scales would teach it their exaggeration.
    """
    seeds = torch.randint(2**31, (len(texts),), generator=run.rng("pictures")).tolist()
    found = []
    for start in range(0, len(texts), CHUNK):
        run.progress("drawing", start, len(texts))
        part = slice(start, start + CHUNK)
        images = model.generate(texts[part], seeds=seeds[part], guidance_scale=1.0, steps=steps)
        found.append(model.absorb(images).float())
    run.progress("drawing", len(texts), len(texts))
    return torch.cat(found)


def flow_matching(
    model: Generator, clean: Float[Tensor, "b c h w"], cond: Condition, rng: torch.Generator
) -> Float[Tensor, "b"]:
    """Squared error of a velocity against the straight path's, ‖v(x_t, t, c) − (eps − x_0)‖², at drawn t and eps.

    x_t = (1 − t) x_0 + t eps, t from the sampler's own shifted grid; eps − x_0 is (x_t − x_0) / t.
    """
    state = model.noised(clean, rng=rng)
    assert state.t is not None
    goal = (state.x - clean) / state.t[:, None, None, None]
    return model.distance(model.predict(state, cond), goal)


@dataclass(frozen=True)
class OwnScenes:
    """Latents of a model's own pictures, and the encoded sentence each was drawn under."""

    clean: Float[Tensor, "n c h w"]
    texts: Condition

    @classmethod
    def of(cls, model: Generator, lines: Sequence[Wording], run: Run, count: int, steps: int) -> "OwnScenes":
        """Draw the same number of pictures under every sentence, about `count` in all and at least one each."""
        texts = [line.text for line in lines] * max(1, count // len(lines))
        return cls(own_latents(model, texts, run, steps=steps), model.encode(texts))

    def flow_matching(self, view: Generator, size: int, run: Run, step: int) -> Float[Tensor, "b"]:
        """The loss of that name on `size` of them, drawn anew in every step."""
        i = torch.randint(len(self.clean), (size,), generator=run.rng("picture", step))
        return flow_matching(view, self.clean[i], self.texts.take(i), run.rng("noise", step))
