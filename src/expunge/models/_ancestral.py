"""A sampler with noise in every step, the last one too: DDIM at eta = 1, which is DDPM's ancestral step, and a floor.

Where every step is N(mu_t(x, prompt), s_t^2 I), what the prompt can reveal is bounded by what its means differ by.
"""

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor


class AncestralScheduler(DDIMScheduler):
    """Steps x' = mu + s z with z ~ N(0, I), on the grid and the levels of DDIM.

    From level a to a' (alphas_cumprod): s = max(floor, sqrt((1 - a') / (1 - a) (1 - a / a'))) and
    mu = sqrt(a') x0 + sqrt(max(1 - a' - s^2, 0)) eps, x0 and eps as the prediction implies them; neither is clipped.
    After the last step, where the usual sampler adds nothing, x' is the clean sample plus noise of the floor.
    Source: arXiv:2010.02502, equations 12 and 16; the floor is certificates.md, section 7.
    """

    @classmethod
    def over(cls, scheduler: SchedulerMixin, floor: float) -> "AncestralScheduler":
        """Take schedule and kind of prediction from a model's scheduler; the floor joins its settings."""
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
        names += ("set_alpha_to_one", "steps_offset", "timestep_spacing", "rescale_betas_zero_snr")
        made = cls(**{name: scheduler.config[name] for name in names if name in scheduler.config})
        made.register_to_config(noise_floor=floor)
        return made

    def law(
        self, pred: Float[Tensor, "b c h w"], timestep: Tensor, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b c h w"], float]:
        """Give mean mu and deviation s of the next x, in at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, pred, here = x.to(wide), pred.to(wide), int(timestep)
        past = here - self.config.num_train_timesteps // self.num_inference_steps
        a = float(self.alphas_cumprod[here])
        after = float(self.alphas_cumprod[past] if past >= 0 else self.final_alpha_cumprod)
        if self.config.prediction_type == "epsilon":
            clean, eps = (x - (1 - a) ** 0.5 * pred) / a**0.5, pred
        else:
            clean, eps = a**0.5 * x - (1 - a) ** 0.5 * pred, a**0.5 * pred + (1 - a) ** 0.5 * x
        spread = max(self.config.noise_floor, max((1 - after) / (1 - a) * (1 - a / after), 0.0) ** 0.5)
        return after**0.5 * clean + max(1 - after - spread**2, 0.0) ** 0.5 * eps, spread

    def step(
        self,
        pred: Float[Tensor, "b c h w"],
        timestep: Tensor,
        x: Float[Tensor, "b c h w"],
        *,
        generator: torch.Generator | list[torch.Generator],
        return_dict: bool = False,
    ) -> tuple[Float[Tensor, "b c h w"]]:
        """Draw the next x."""
        mean, spread = self.law(pred, timestep, x)
        return (self.drawn(mean, spread, generator).to(x.dtype),)

    @staticmethod
    def drawn(mean: Tensor, spread: float, rng: torch.Generator | list[torch.Generator]) -> Tensor:
        """Add the step's noise to its mean."""
        return mean + spread * randn_tensor(mean.shape, generator=rng, device=mean.device, dtype=mean.dtype)
