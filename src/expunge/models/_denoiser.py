"""What all denoisers share: their own sampler, walked step by step so that views and guards apply.

`x` is always what the network reads, `t` its noise level in [0, 1]. What x is made of at a level, and how the sampler
is started, is the business of `_diffusion.py` (U-Nets) and `_flow.py` (rectified flow).
"""

import copy
import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import State
from expunge.models._base import Adapter
from expunge.models._recompute import recomputing
from expunge.models._texts import Gone, Reader, Texts

# A step depends on x alone: samples may leave the batch.
_MEMORYLESS = (DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler)

PROMPTS = 16  # encoded together: bounds memory

Model = TypeVar("Model", bound="Denoiser")


class Denoiser(Adapter):
    """Sampling and states for a network that predicts noise or velocity; subclasses say how, and how it is called."""

    pipeline: DiffusionPipeline
    scheduler: SchedulerMixin
    latent: tuple[int, int, int]
    """Channels, height and width of a latent."""
    texts: Reader | None = None
    """What stands for the text encoders where they were given away, or are listened to."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, padding included."""

    @torch.no_grad()
    def without_encoders(self: Model, prompts: Sequence[str]) -> Model:
        """Give this model with some prompts encoded, and without its text encoders.

        Their memory goes with the last reference to `self`. What is given knows `prompts` and "", and `encode` raises
        InputError for any other; it cannot be saved as a pipeline, and its text encoders cannot be edited.
        """
        known = list(dict.fromkeys(("", *prompts)))
        twin = copy.copy(self)
        parts = [self.encode(known[start : start + PROMPTS]) for start in range(0, len(known), PROMPTS)]
        twin.texts = Texts({text: row for row, text in enumerate(known)}, Condition.cat(parts))
        heads = [part for part in self.network if part.startswith("text_encoder")]
        twin.network = nn.ModuleDict(
            dict(self.network.items()) | {part: Gone(self.network[part].config) for part in heads}
        )
        twin._base, twin._blocks = dict(twin.network.named_parameters()), recomputing(twin.network)
        twin.weights = {path: tensor for path, tensor in self.weights.items() if path in twin._base}
        twin.pipeline = copy.copy(self.pipeline)
        twin.pipeline.register_modules(**dict.fromkeys(heads))
        return twin

    @abstractmethod
    def predict_at(self, x: Float[Tensor, "b c h w"], timestep: Tensor, cond: Condition) -> Float[Tensor, "b c h w"]:
        """Run the network at a scheduler timestep, one for all samples or one each."""

    @abstractmethod
    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Turn clean latents into images in [0, 1]."""

    def predict(self, state: State, cond: Condition) -> Float[Tensor, "b ..."]:
        """Give the network's native prediction (eps, v or velocity) at a state; one prompt may serve the whole batch.

        Raises InputError if neither one prompt nor one prompt per sample is given.
        """
        size = state.x.shape[0]
        if len(cond) not in (1, size):
            raise InputError(f"{len(cond)} prompts for {size} states; give one, or one each")
        if len(cond) != size:
            cond = _spread(cond, size)
        return self.predict_at(state.x, self._timestep(state), cond)

    def distance(self, pred: Float[Tensor, "b ..."], goal: Float[Tensor, "b ..."]) -> Float[Tensor, "b"]:
        """Mean squared error of two predictions per sample, computed in at least float32."""
        wide = torch.promote_types(pred.dtype, torch.float32)
        return (pred.to(wide) - goal.to(wide)).square().flatten(1).mean(1)

    @torch.no_grad()
    def visit(self, cond: Condition, *, rng: torch.Generator, guidance_scale: float, steps: int = 50) -> State:
        """Walk the model's own guided sampler from noise, each sample to its own uniformly drawn grid point.

        Every point where the sampler would ask the network is equally likely, the initial noise included. `x` has
        exactly the noise level of `t`: after a DDIM step from timestep s that is s - N // steps, which differs from
        the grid by less than one timestep where steps do not divide N. Samples that have arrived leave the batch
        (DDIM, Euler, flow), so a batch costs about half of `steps` guided calls each.
        """
        scheduler = self._started(steps)
        size = len(cond)
        x = self._start(scheduler, self._noise(size, rng))
        grid = _grid(scheduler)
        stops = grid[torch.randint(len(grid), (size,), generator=rng, device=rng.device).cpu()]
        cond, uncond = self._pair(cond, self.encode([""]))
        found, alive = torch.empty_like(x), torch.arange(size)
        for index, timestep in enumerate(scheduler.timesteps):
            here, going = stops[alive] == index, stops[alive] > index
            found[alive[here]] = self._ready(scheduler, x, timestep)[here]
            if not going.any():
                break
            if isinstance(scheduler, _MEMORYLESS) and not going.all():
                x, alive = x[going], alive[going]
                cond, uncond = cond.take(going.nonzero()[:, 0]), uncond.take(going.nonzero()[:, 0])
            x = self._advance(scheduler, x, timestep, cond, uncond, guidance_scale, rng)
        return State(x=found, t=self._levels(scheduler)[stops].to(self.device))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance_scale: float,
        steps: int,
        negative: Sequence[str] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Draw one image in [0, 1] per prompt and seed with the model's own sampler, as the stock pipeline does.

        u + guidance_scale * (c - u), u under `negative` or the empty prompt; guidance_scale 1 asks the network once
        per step, any other value in one call for both. Each image's noise comes from its own CPU generator, so what
        else is in the batch changes it by float rounding only. Raises InputError for lengths that disagree.
        """
        for what, given in (("seeds", seeds), ("negative prompts", negative)):
            if given is not None and len(given) != len(prompts):
                raise InputError(f"{len(given)} {what} for {len(prompts)} prompts")
        scheduler = self._started(steps)
        cond, uncond = self._pair(self.encode(prompts), self.encode([""] if negative is None else negative))
        rngs = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        x = self._start(scheduler, self._noise(len(prompts), rngs))
        for timestep in scheduler.timesteps:
            x = self._advance(scheduler, x, timestep, cond, uncond, guidance_scale, rngs)
        images = self.decode(x)
        for guard in self.guards:
            images = guard.image(images)
        return images

    @abstractmethod
    def noised(self, clean: Float[Tensor, "b c h w"], *, rng: torch.Generator) -> State:
        """Noise clean latents to a drawn level."""

    @abstractmethod
    def as_eps(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert a native prediction to noise."""

    @abstractmethod
    def as_clean(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert a native prediction to the clean sample it implies."""

    def merged(self) -> DiffusionPipeline:
        """Give a stock pipeline whose weights are what this view sees, ready for `save_pretrained`.

        Only the touched components are copied. Raises InputError for a view with guards or hooks: they are code, and
        a folder of weights would silently lose them.
        """
        if self.texts is not None:
            raise InputError(f"{self.name!r} gave its text encoders away; a diffusers folder needs them")
        if self.guards or self.hooks:
            raise InputError(f"view of {self.name!r} carries guards or hooks, which no diffusers folder can hold")
        twin = copy.copy(self.pipeline)
        for part in sorted({path.partition(".")[0] for path in self.weights}):
            module = copy.deepcopy(self.network[part])
            for path, tensor in self.weights.items():
                if path.startswith(part + "."):
                    module.get_parameter(path.partition(".")[2]).data.copy_(tensor)
            twin.register_modules(**{part: module})
        return twin

    @abstractmethod
    def _started(self, steps: int) -> SchedulerMixin:
        """Give a private copy of the scheduler, set to a number of steps: walks never share counters and histories."""

    @abstractmethod
    def _levels(self, scheduler: SchedulerMixin) -> Float[Tensor, "n"]:
        """Give the t at whose noise level x is when the network is asked, per call."""

    @abstractmethod
    def _timestep(self, state: State) -> Float[Tensor, "b"]:
        """Give the scheduler's timesteps of a state."""

    def _start(self, scheduler: SchedulerMixin, noise: Tensor) -> Tensor:
        """Turn unit noise into the sampler's first x."""
        return noise

    def _ready(self, scheduler: SchedulerMixin, x: Tensor, timestep: Tensor) -> Tensor:
        """Turn the sampler's x into what the network reads."""
        return x

    def _advance(
        self,
        scheduler: SchedulerMixin,
        x: Tensor,
        timestep: Tensor,
        cond: Condition,
        uncond: Condition,
        scale: float,
        rng: torch.Generator | list[torch.Generator],
    ) -> Tensor:
        """One guided sampler step in the scheduler's own space."""
        ready = self._ready(scheduler, x, timestep)
        pred = self._guided(ready, timestep, cond, uncond, scale)
        named: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(scheduler.step).parameters:
            named["generator"] = rng
        return scheduler.step(pred, timestep, x, **named)[0]

    def _guided(self, x: Tensor, timestep: Tensor, cond: Condition, uncond: Condition, scale: float) -> Tensor:
        if scale == 1 and not self.guards:
            return self.predict_at(x, timestep, cond)
        u, c = self.predict_at(torch.cat([x, x]), timestep, Condition.cat([uncond, cond])).chunk(2)
        if not self.guards:
            return u + scale * (c - u)
        return self._guarded(self._state(x, timestep), c, u, scale)

    def _state(self, x: Tensor, timestep: Tensor) -> State:
        return State(x=x, t=(timestep.float() / self.scheduler.config.num_train_timesteps).expand(x.shape[0]))

    def _guarded(self, state: State, c: Tensor, u: Tensor, scale: float) -> Tensor:
        """Let the guards combine in turn: each next one sees the prompt prediction that explains the last result.

        guided = u + scale * (c' - u) defines c'.
        """
        if scale == 0 and len(self.guards) > 1:
            raise InputError("guidance scale 0 leaves nothing for a second guard to combine; use another scale")
        guided = self.guards[0].combine(self, state, c, u, scale)
        for guard in self.guards[1:]:
            guided = guard.combine(self, state, u + (guided - u) / scale, u, scale)
        return guided

    def _pair(self, cond: Condition, uncond: Condition) -> tuple[Condition, Condition]:
        for guard in self.guards:
            cond = guard.condition(cond)
        return cond, _spread(uncond, len(cond)) if len(uncond) == 1 else uncond

    def _noise(self, size: int, rng: torch.Generator | list[torch.Generator]) -> Tensor:
        dtype = next(iter(self._base.values())).dtype
        return randn_tensor((size, *self.latent), generator=rng, device=self.device, dtype=dtype)


def _grid(scheduler: SchedulerMixin) -> Int[Tensor, "n"]:
    """Calls at which x stands on the grid: where a timestep is asked twice (PNDM, Heun), the second time."""
    times = scheduler.timesteps.cpu()
    last = torch.ones(len(times), dtype=torch.bool)
    last[:-1] = times[:-1] != times[1:]
    return last.nonzero()[:, 0]


def _spread(cond: Condition, size: int) -> Condition:
    return cond.take(torch.zeros(size, dtype=torch.long, device=cond.tokens.device))
