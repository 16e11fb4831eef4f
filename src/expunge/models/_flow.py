"""Rectified flow: what x, t and a prediction are for networks that predict velocity, and how guidance reaches them.

x = (1 - t) x0 + t eps, t in [0, 1], 1 = noise; the prediction is v = eps - x0, so x0 = x - t v and eps = x + (1 - t) v.
The sampler's timestep is `num_train_timesteps` * t on a grid shifted towards noise. Source: Stable Diffusion 3
(arXiv:2403.03206, section 2); guidance distillation: arXiv:2210.03142.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import State
from expunge.models._denoiser import Denoiser


class Flow(Denoiser):
    """Noise levels, conversions and both kinds of guidance of a rectified flow.

    True guidance (`distilled` is False): as in every denoiser, v_u + guidance_scale * (v_c - v_u) from two predictions,
    and one prediction alone at guidance_scale 1. Timestep-distilled models (FLUX.1-schnell) are trained for 1.

    Embedded guidance (`distilled`): the network reads a scale g and answers with its own estimate of
    v_u + g (v_c - v_u). Sampling hands it guidance_scale as g and asks once per step; there is no unconditional pass.
    `encode` sets g = 1, where that estimate is v_c, so `predict` means the same as in undistilled models: the
    prediction under the prompt, and under "" the unconditional one. `Condition.extra["guidance"]` holds g.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    distilled: bool
    tokens_per_image: int
    """Positions the transformer gives the image; dynamic shifting depends on it."""

    def noised(self, clean: Float[Tensor, "b c h w"], *, rng: torch.Generator) -> State:
        """Noise clean latents to a uniformly drawn level of the sampler's own finest grid, its shift included.

        x = (1 - t) clean + t eps; the noise is `(x - (1 - t) clean) / t`, t is never 0.
        """
        grid = self._levels(self._started(self.scheduler.config.num_train_timesteps))
        t = grid[torch.randint(len(grid), (clean.shape[0],), generator=rng, device=rng.device).cpu()].to(self.device)
        eps = torch.randn(clean.shape, generator=rng, device=rng.device).to(clean)
        level = t.to(clean.dtype)[:, None, None, None]
        return State(x=(1 - level) * clean + level * eps, t=t)

    def as_eps(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert velocity to noise.

        eps = x + (1 - t) v. Affine in `pred`, so guiding before or after the conversion is the same.
        """
        level = self._timestep(state) / self.scheduler.config.num_train_timesteps
        return state.x + (1 - level.to(pred.dtype)[:, None, None, None]) * pred

    def as_clean(self, state: State, pred: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Convert velocity to the clean sample it implies: x0 = x - t v."""
        level = self._timestep(state) / self.scheduler.config.num_train_timesteps
        return state.x - level.to(pred.dtype)[:, None, None, None] * pred

    def _shift_limits(self) -> Mapping[str, float]:
        """Shift at the smallest and largest image, where the scheduler's config names none."""
        return {"base_shift": 0.5, "max_shift": 1.15}

    def _started(self, steps: int) -> FlowMatchEulerDiscreteScheduler:
        total = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= total:
            raise InputError(f"{steps} sampler steps; legal: 1 to {total}")
        scheduler = copy.deepcopy(self.scheduler)
        named: dict[str, Any] = {"mu": self._mu()} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(**self._grid(steps), device=self.device, **named)
        return scheduler

    def _grid(self, steps: int) -> dict[str, Any]:
        """The unshifted grid, in the words of `set_timesteps`: by default the scheduler's own."""
        return {"num_inference_steps": steps}

    def _mu(self) -> float:
        """Log of the shift for this image size: linear in the image's tokens, as the pipelines have it."""
        config = self.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = (config.get(name, number) for name, number in self._shift_limits().items())
        slope = (high - low) / (many - few)
        return self.tokens_per_image * slope + (low - few * slope)

    def _levels(self, scheduler: FlowMatchEulerDiscreteScheduler) -> Float[Tensor, "n"]:
        return scheduler.timesteps.float().cpu() / self.scheduler.config.num_train_timesteps

    def _timestep(self, state: State) -> Float[Tensor, "b"]:
        if state.t is None:
            raise InputError("a denoiser's state needs its noise level t; this one has none")
        return state.t.to(self.device) * self.scheduler.config.num_train_timesteps

    def _guided(self, x: Tensor, timestep: Tensor, cond: Condition, uncond: Condition, scale: float) -> Tensor:
        """One guided prediction; guards of a distilled model see c with u + scale (c - u) = the network's answer."""
        if not self.distilled:
            return super()._guided(x, timestep, cond, uncond, scale)
        asked = cond.at(scale)
        if not self.guards:
            return self.predict_at(x, timestep, asked)
        if scale == 0:
            raise InputError("guidance scale 0 leaves nothing for a guard to combine; use another scale")
        u, whole = self.predict_at(torch.cat([x, x]), timestep, Condition.cat([uncond, asked])).chunk(2)
        return self._guarded(self._state(x, timestep), u + (whole - u) / scale, u, scale)
