"""How an eraser must behave on a toy model."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Generator
from expunge.core.patch import Patch
from expunge.models.load import load
from expunge.patches.guard import GuardPatch
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.shared import SharedPatch
from expunge.patches.weights import WeightPatch
from expunge.testing.shape import ContractError, expect

TINY: Mapping[str, tuple[str, ...]] = {
    "unet": ("tiny-unet", "tiny-unet-v", "tiny-sdxl"),
    "mmdit": ("tiny-sd3", "tiny-flux", "tiny-flux-distilled"),
}
"""Toy models a method is tried on, by the families it claims."""

BRIEF: Mapping[str, Any] = {"steps": 12, "walk": 4, "pool": 6, "batch": 2, "lr": 1e-3, "ridge": 0.5}
"""Fields that cost time, cut to what a toy needs, with a step size that gets somewhere in so few steps and a ridge
that fits a toy's short rows; a method without them is tried as it is."""

REQUEST = Request.of("red cat", anchor="dog", retain=("blue car", "guitar"))

# A toy whose prediction moves less than this between two prompts (share of its mean square) does not listen.
_HEARING = 1e-3


class Trial:
    """One method on one toy model, erased once and looked at from several sides."""

    def __init__(self, cls: type[Eraser], name: str, config: Mapping[str, Any]) -> None:
        self.cls, self.name = cls, name
        known = {field.name for field in fields(cls)}
        self.method = replace(cls(), **{**{key: cut for key, cut in BRIEF.items() if key in known}, **config})

    @cached_property
    def model(self) -> Generator:
        """The toy; raises ContractError if it ignores its prompt, because every check would then pass vacuously."""
        model = load(self.name)
        state = model.visit(model.encode(["guitar"]), rng=Run().rng("hearing"), guidance_scale=1.0, steps=4)
        here, there = (model.predict(state, model.encode([phrase])) for phrase in ("red cat", "dog"))
        share = float((here - there).square().mean() / here.square().mean())
        expect(share > _HEARING, f"{self.name} does not listen: another prompt moves its prediction by {share:.2g}")
        return model

    @cached_property
    def before(self) -> tuple[str, Float[Tensor, "b 3 h w"]]:
        """Fingerprint and pictures of the toy that nothing has been erased from yet."""
        return _fingerprint(self.model), self.picture(self.model)

    @cached_property
    def first(self) -> tuple[Patch, bool]:
        """What the method gives for seed 0, and whether it left torch's global randomness unspent."""
        _ = self.before  # looked at while nothing has been erased
        state = torch.random.get_rng_state()
        return self.erase(), torch.equal(state, torch.random.get_rng_state())

    @property
    def patch(self) -> Patch:
        """What the method gives for seed 0."""
        return self.first[0]

    def erase(self) -> Patch:
        """Run the method anew."""
        return self.method.erase(self.model, REQUEST, Run(seed=0))

    def picture(self, model: Generator) -> Float[Tensor, "b 3 h w"]:
        """Draw the target and a retained concept."""
        prompts = [REQUEST.target[0].phrase, REQUEST.retain[0].phrase]
        return model.generate(prompts, seeds=[0, 1], guidance_scale=3.0, steps=3)

    @cached_property
    def moved_target(self) -> float:
        """How far the patch moves the target."""
        return self.moved(REQUEST.target[0])

    @torch.no_grad()
    def moved(self, concept: Concept) -> float:
        """Measure how far the patch moves the prediction under a concept, on the base's own states.

        Guards act on the sampler, not on a prediction: there it is the pictures, twelve per concept.
        """
        if self.patch.kind == GuardPatch.kind:
            pairs = [
                seen.generate([concept.phrase] * 12, seeds=range(12), guidance_scale=3.0, steps=3)
                for seen in (self.patch.on(self.model), self.model)
            ]
            return float((pairs[0] - pairs[1]).square().mean())
        patched, cond = self.patch.on(self.model), self.model.encode([concept.phrase] * 8)
        state = self.model.visit(cond, rng=Run().rng("probe"), guidance_scale=3.0, steps=8)
        after = patched.predict(state, patched.encode([concept.phrase] * 8))
        return float(self.model.distance(after, self.model.predict(state, cond)).mean())


def leaves_the_model_untouched(trial: Trial) -> None:
    """Network byte-identical, no hooks left, same pictures, torch's global randomness unspent."""
    (digest, picture), (patch, unspent), state = trial.before, trial.first, torch.random.get_rng_state()
    trial.picture(patch.on(trial.model))
    unspent = unspent and torch.equal(state, torch.random.get_rng_state())
    expect(unspent, "erasing or viewing spends torch's global random numbers")
    expect(_fingerprint(trial.model) == digest, "erasing or viewing changed the network")
    expect(torch.equal(trial.picture(trial.model), picture), "the base draws another picture than before")


def depends_on_the_seed_only(trial: Trial) -> None:
    """Same seed, same tensors, whatever torch's global random state."""
    first = trial.patch.tensors()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        second = trial.erase().tensors()
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    expect(same, "two runs with one seed give different tensors")


def survives_storage(trial: Trial) -> None:
    """Saved, read and laid on again, it draws the same picture bit for bit."""
    tensors = load_tensors(save_tensors(trial.patch.tensors()))
    again = _rebuilt(trial, tensors, json.loads(json.dumps(trial.patch.meta())))
    same = torch.equal(trial.picture(again.on(trial.model)), trial.picture(trial.patch.on(trial.model)))
    expect(same, "the patch draws another picture after it was stored and read")


def moves_the_target(trial: Trial) -> None:
    """The prediction under the target changes, finitely."""
    moved = trial.moved_target
    expect(0 < moved < float("inf"), f"the prediction under the target moved by {moved}")


def moves_the_target_more_than_what_is_retained(trial: Trial) -> None:
    """The target's prediction moves more than that of every retained concept."""
    target = trial.moved_target
    for concept in REQUEST.retain:
        kept = trial.moved(concept)
        expect(target > kept, f"the target moved by {target:.3g}, but retained {concept.name!r} by {kept:.3g}")


CONDUCT: tuple[Callable[[Trial], None], ...] = (
    leaves_the_model_untouched,
    depends_on_the_seed_only,
    survives_storage,
    moves_the_target,
    moves_the_target_more_than_what_is_retained,
)


def _fingerprint(model: Generator) -> str:
    """Hash every tensor of the network with its name and training flag, and count its hooks."""
    digest = hashlib.sha256()
    for name, tensor in model.network.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tensor.dtype} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, module in model.network.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        digest.update(f"{name} {module.training} {hooks}".encode())
    return digest.hexdigest()


def _rebuilt(trial: Trial, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Patch:
    match trial.patch.kind:
        case WeightPatch.kind:
            return WeightPatch.restore(tensors, meta)
        case LowRankPatch.kind:
            return LowRankPatch.restore(tensors, meta)
        case SharedPatch.kind:
            return SharedPatch.restore(tensors, meta)
        case GuardPatch.kind:
            return trial.cls.restore(tensors, meta)
    raise ContractError(f"unknown kind of patch {trial.patch.kind!r}; legal: weights, low_rank, shared, guard")
