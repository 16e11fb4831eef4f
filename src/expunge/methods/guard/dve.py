"""Differential Vector Erasure, a reconstruction: take the target's direction out of the velocity (arXiv 2026).

RECONSTRUCTION: only the abstract was available to us and no code. What is projected, gate, multi-concept fit and every
default here are our reading of Zhang et al.; nothing may be reported as "the paper's number".
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.directions import coefficients, cosines, from_rows, to_rows
from expunge.ops.steer import Steer
from expunge.patches.guard import GuardPatch, condition_of, condition_tensors

Preds = list[Float[Tensor, "b c h w"]]


@dataclass(frozen=True, kw_only=True)
class DVE(Eraser):
    """Reconstruction: subtract what the guided prediction holds of the direction from anchor to target.

    v' = v − strength · Σ_k relu(alpha_k − threshold) · d_k,  d_k = v(target_k) − v(anchor_k), all v guided.
    alpha_k: how much of the target v holds, see mode. A prompt that is the target gets the anchor's flow (threshold 0),
    one that holds nothing of it stays. Differences at one state are proportional in velocity, noise and v-prediction,
    so alpha is the same number in all of them. Our reading of the abstract, not the authors' algorithm. Costs one more
    network call per step, for two prompts per target; the anchor "" is the unconditional prediction.
    """

    paper: ClassVar[str] = "arXiv:2602.01089"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    reconstruction: ClassVar[bool] = True
    uses_retain: ClassVar[bool] = False

    mode: Literal["joint", "residual", "raw"] = "joint"
    """What alpha is. joint: the target's coefficient in the fit of v − u by v(target) − u and v(anchor) − u, u
    unconditional. residual: that of v − v(anchor) by d; anything unlike the anchor then seems partly the target,
    while jointly a longer sentence with the target in it shows less of it. raw: that of v by d, the abstract's literal
    reading; most of v is common to all prompts, so harmless ones are edited too, and only flow velocity gives it a
    meaning."""

    gate: Literal["relu", "identity"] = "relu"
    """relu: act only where the prompt points towards the target. identity: an orthogonal projection, both ways, whose
    threshold is 0."""

    strength: float = 1.0
    """lambda in v' = v − lambda · gate(alpha − threshold) · d. 0: nothing changes; 1 to 1.5 is the useful range."""

    threshold: float = 0.05
    """tau: the share of d that is let pass. A pure number, the same in velocity, noise and v-prediction (not raw)."""

    cosine: float = -1.0
    """Act only where the cosine of what is fitted and the target's direction reaches this; −1 asks for nothing."""

    local: bool = False
    """Fit alpha at every place of the latent on its own, over channels, instead of once per sample."""

    floor: float = 1e-6
    """rho in alpha = ⟨r, d⟩ / (‖d‖² + rho · ‖r‖²), r what is fitted: far smaller directions are noise."""

    t_low: float = 0.0
    """No intervention below this t. t is the share of noise in flow models, timestep / N in U-Nets; 1 = noise."""

    t_high: float = 1.0
    """No intervention above this t."""

    def erase(self, model: Generator, request: Request, run: Run) -> GuardPatch:
        """Guard that remembers the encoded targets and anchors; nothing is trained."""
        if self.mode == "raw" and model.family != "mmdit":
            raise InputError(f"mode 'raw' projects flow velocity; {model.name!r} of {model.family!r} has none")
        targets, anchors = zip(*request.pairs, strict=True)
        return self._patch(model.encode(targets), model.encode(anchors))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> GuardPatch:
        """Rebuild the guard from its stored prompts and settings."""
        target, anchor = (condition_of(tensors, name, meta["bands"]) for name in ("target", "anchor"))
        return cls(**meta["config"])._patch(target, anchor)

    def removed(
        self, pred: Float[Tensor, "b c h w"], uncond: Float[Tensor, "b c h w"], target: Preds, anchor: Preds
    ) -> Float[Tensor, "b c h w"]:
        """What is subtracted from a guided prediction: Σ_k strength · relu(alpha_k − threshold) · d_k.

        uncond: the unconditional prediction; target, anchor: guided ones under each, at the same states.
        """
        steer = [c - a for c, a in zip(target, anchor, strict=True)]
        if self.mode == "joint":
            axes = [whole - uncond for whole in (*target, *anchor)]
            sources = [pred - uncond] * len(axes)
        else:
            axes, sources = steer, [pred if self.mode == "raw" else pred - a for a in anchor]
        rows = (torch.stack([to_rows(x, self.local) for x in side], 1) for side in (sources, axes, steer))
        evidence, directions, steered = rows
        share = coefficients(evidence, directions, self.floor)
        share = (share - self.threshold).clamp(min=0) if self.gate == "relu" else share
        share = self.strength * share * (cosines(evidence, directions) >= self.cosine)
        return from_rows((share[:, : len(steer), None] * steered.double()).sum(1), pred, self.local)

    def _patch(self, target: Condition, anchor: Condition) -> GuardPatch:
        state = {**condition_tensors(target, "target"), **condition_tensors(anchor, "anchor")}
        window = (self.t_low, self.t_high) if self.strength else None
        facts = {"config": asdict(self), "bands": [list(band) for band in target.bands]}
        return GuardPatch(Steer(self.removed, target, anchor, window), state, facts)
