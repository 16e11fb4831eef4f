"""Diffusion: what x, t and a prediction are for networks that predict noise or v.

`x` is what the network reads (diffusers' `scale_model_input`), x = sqrt(a) x0 + sqrt(1 - a) eps with
a = alphas_cumprod[timestep], whatever space the scheduler steps in. `t` = timestep / num_train_timesteps.
"""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.generator import State
from expunge.models._ancestral import AncestralScheduler
from expunge.models._denoiser import Denoiser

PREDICTIONS = ("epsilon", "v_prediction")
"""What a U-Net here may predict: eps, or v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans and Ho, arXiv:2202.00512)."""

SAMPLERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers whose state between two steps is known to lie at the timestep asked next; tests hold each to it."""

Model = TypeVar("Model", bound="Diffusion")


class Diffusion(Denoiser):
    """Noise levels and conversions of a variance-preserving diffusion."""

    def ancestral(self: Model, floor: float) -> Model:
        """Give this model with a sampler whose every step is noisy by at least `floor`, a deviation of its latents.

        Raises InputError for a floor that is not above 0 and at most 1.
        """
        if not 0 < floor <= 1:
            raise InputError(f"noise floor is {floor}; legal: above 0, at most 1")
        twin = copy.copy(self)
        twin.scheduler = AncestralScheduler.over(self.scheduler, floor)
        return twin

    @torch.no_grad()
    def path_gaps(
        self, prompts: Sequence[str], others: Sequence[str], *, seeds: Sequence[int], guidance_scale: float, steps: int
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "t"]]:
        """Walk as `generate` does under `prompts`, and say how far each step's mean is from that under `others`.

        Gives |mu_t(x_t, prompt) - mu_t(x_t, other)|, guidance and guards included, and each step's deviation s_t.
        Raises InputError for a sampler that is not ancestral.
        """
        scheduler = self._started(steps)
        if not isinstance(scheduler, AncestralScheduler):
            raise InputError(f"{type(scheduler).__name__} has no noise in every step; legal: the ancestral sampler")
        sides = [self._pair(self.encode(texts), self.encode([""])) for texts in (prompts, others)]
        rngs = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        x, gaps, noise = self._start(scheduler, self._noise(len(prompts), rngs)), [], []
        for timestep in scheduler.timesteps:
            preds = [self._guided(x, timestep, cond, uncond, guidance_scale) for cond, uncond in sides]
            (mean, spread), (other, _) = (scheduler.law(pred, timestep, x) for pred in preds)
            gaps.append((mean - other).flatten(1).double().norm(dim=1))
            noise.append(spread)
            x = scheduler.drawn(mean, spread, rngs).to(x.dtype)
        return torch.stack(gaps, dim=1).cpu(), torch.tensor(noise, dtype=torch.float64)

    def noised(self, clean: Float[Tensor, "b c h w"], *, rng: torch.Generator) -> State:
        """Noise clean latents to a uniformly drawn level of the training schedule.

        x = sqrt(a) clean + sqrt(1 - a) eps; the noise is `(x - sqrt(a) clean) / sqrt(1 - a)`.
        """
        size, total = clean.shape[0], self.scheduler.config.num_train_timesteps
        timestep = torch.randint(total, (size,), generator=rng, device=rng.device).to(self.device)
        eps = torch.randn(clean.shape, generator=rng, device=rng.device).to(clean)
        a = self._alpha_bar(timestep.float()).to(clean.dtype)
        return State(x=a.sqrt() * clean + (1 - a).sqrt() * eps, t=timestep.float() / total)

    def as_eps(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert a native prediction to noise.

        eps itself, or from v: eps = sqrt(a) v + sqrt(1 - a) x. Affine in `pred` with coefficients that sum to one
        over any guidance combination, so guiding before or after the conversion is the same.
        """
        if self.scheduler.config.prediction_type == "epsilon":
            return pred
        a = self._alpha_bar(self._timestep(state)).to(pred.dtype)
        return a.sqrt() * pred + (1 - a).sqrt() * state.x

    def as_clean(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert a native prediction to the clean sample it implies.

        x0 = sqrt(a) x - sqrt(1 - a) v, or (x - sqrt(1 - a) eps) / sqrt(a); from eps it does not exist at a = 0.
        """
        a = self._alpha_bar(self._timestep(state)).to(pred.dtype)
        if self.scheduler.config.prediction_type == "epsilon":
            return (state.x - (1 - a).sqrt() * pred) / a.sqrt()
        return a.sqrt() * state.x - (1 - a).sqrt() * pred

    def _started(self, steps: int) -> SchedulerMixin:
        """A private copy of the scheduler: walks never share its counters and histories."""
        total = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= total:
            raise InputError(f"{steps} sampler steps; legal: 1 to {total}")
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def _start(self, scheduler: SchedulerMixin, noise: Tensor) -> Tensor:
        return noise * scheduler.init_noise_sigma

    def _ready(self, scheduler: SchedulerMixin, x: Tensor, timestep: Tensor) -> Tensor:
        return scheduler.scale_model_input(x, timestep)

    def _levels(self, scheduler: SchedulerMixin) -> Float[Tensor, "n"]:
        """The t at whose noise level x is when the network is asked, per call."""
        times = scheduler.timesteps.float().cpu()
        total = self.scheduler.config.num_train_timesteps
        if isinstance(scheduler, DDIMScheduler):
            times = torch.cat([times[:1], times[:-1] - total // scheduler.num_inference_steps])
        return times / total

    def _timestep(self, state: State) -> Float[Tensor, "b"]:
        """Timesteps of a state; whole ones come back exactly, in spite of the rounding of t."""
        if state.t is None:
            raise InputError("a denoiser's state needs its noise level t; this one has none")
        timestep = state.t.to(self.device) * self.scheduler.config.num_train_timesteps
        whole = timestep.round()
        return torch.where((timestep - whole).abs() < 1e-3, whole, timestep)

    def _alpha_bar(self, timestep: Float[Tensor, "b"]) -> Float[Tensor, "b 1 1 1"]:
        """alphas_cumprod at a timestep; between whole ones sigma = sqrt((1 - a) / a) is linear, as in Euler."""
        table = self.scheduler.alphas_cumprod.to(self.device)
        low = timestep.floor().long().clamp(0, len(table) - 1)
        high = (low + 1).clamp(max=len(table) - 1)
        sigma = torch.lerp(_sigma(table[low]), _sigma(table[high]), (timestep - low).to(table.dtype))
        a = torch.where(timestep == low, table[low], 1 / (1 + sigma.square()))
        return a[:, None, None, None]


def _sigma(a: Tensor) -> Tensor:
    return ((1 - a) / a).sqrt()
