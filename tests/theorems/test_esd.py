"""What must hold for ESD, and what must not."""

import hashlib
from collections import defaultdict

import pytest
import torch
from diffusers import UNet2DConditionModel
from linear_toy import CROSS, SELF, LinearToy
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook, State
from expunge.methods.finetune.esd import ESD
from expunge.models.load import load
from expunge.models.unet import unet_paths
from expunge.ops.trajectory import Goals, Walk, uncond_drift

TOY = LinearToy.seeded()
SHORT = {"group": "cross_attention", "steps": 8, "pool": 6, "walk": 4, "batch": 2, "lr": 1e-3}
CAT = Request.of("cat")


def train(method: ESD, request: Request = CAT, model: Generator = TOY) -> tuple[Generator, dict[str, list[float]]]:
    log = defaultdict(list)
    patch = method.erase(model, request, Run(log=lambda name, step, value: log[name].append(value)))
    return patch.on(model), log


def guidance() -> Tensor:
    """c − u on the toy: the same at every state."""
    return TOY.weight(CROSS) @ (TOY.encode(["cat"]).subject - TOY.encode([""]).subject)[0]


@pytest.mark.parametrize("trajectory", ["teacher", "student"])
@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.0, 3.0])
def test_goal_is_one_plus_strength_guidances_away(trajectory: str, strength: float) -> None:
    """c − goal = (1 + strength)(c − u): strength −1 asks for nothing, 0 for the unconditional prediction."""
    edited, log = train(ESD(strength=strength, trajectory=trajectory, **SHORT))
    assert log["loss"][0] == pytest.approx(
        (1 + strength) ** 2 * float(guidance().square().mean()), rel=1e-12, abs=1e-20
    )
    unchanged = torch.equal(edited.weight(CROSS), TOY.weight(CROSS))
    assert unchanged == (strength == -1.0)
    assert (log["grad_norm"][0] < 1e-12) == (strength == -1.0)


@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.0, 5.0])
def test_erasing_what_reads_as_the_empty_prompt_changes_nothing(strength: float) -> None:
    edited, _ = train(ESD(strength=strength, **SHORT), Request.of("void"))
    assert torch.equal(edited.weight(CROSS), TOY.weight(CROSS))
    moved, _ = train(ESD(strength=strength + 2, **SHORT))
    assert not torch.equal(moved.weight(CROSS), TOY.weight(CROSS))


def test_later_scripts_form_is_the_papers_with_strength_plus_one() -> None:
    """c − (eta + 1)(c − u), trained under c itself, is u − eta (c − u)."""
    paper, _ = train(ESD(strength=1.0, **SHORT))
    later, _ = train(ESD(strength=2.0, erase_from="cat", **SHORT))
    same, _ = train(ESD(strength=1.0, erase_from="cat", **SHORT))
    torch.testing.assert_close(later.weight(CROSS), paper.weight(CROSS), rtol=1e-6, atol=1e-7)
    assert (same.weight(CROSS) - paper.weight(CROSS)).norm() > 1e-4


def test_attribute_is_removed_from_the_phrase_that_has_it() -> None:
    """f moves to f − strength (c − u), the goal of the paper's follow-up, and c is not supervised."""
    edited, log = train(ESD(erase_from="red cat", group="cross_kv", steps=250, pool=4, batch=2, lr=1e-2))
    f, w = TOY.encode(["red cat"]).subject[0], edited.weight(CROSS)
    torch.testing.assert_close(w @ f, TOY.weight(CROSS) @ f - guidance(), rtol=0, atol=1e-3)
    assert log["loss"][-1] < 1e-6 < log["loss"][0]
    c = TOY.encode(["cat"]).subject[0]
    assert (w @ c - (TOY.weight(CROSS) @ c - guidance())).abs().max() > 1e-2


def test_trained_prediction_reaches_the_goal_and_the_unconditional_one_drifts() -> None:
    edited, _ = train(ESD(group="cross_kv", steps=250, pool=4, batch=2, lr=1e-2))
    u, c = TOY.encode([""]).subject[0], TOY.encode(["cat"]).subject[0]
    old, new = TOY.weight(CROSS), edited.weight(CROSS)
    torch.testing.assert_close(new @ c, old @ u - guidance(), rtol=0, atol=1e-3)
    state = TOY.visit(TOY.encode(["cat"] * 5), rng=Run().rng("probe"), guidance_scale=3.0)
    drift = uncond_drift(edited, TOY, state)
    torch.testing.assert_close(drift, ((new - old) @ u).square().mean().expand(5))
    assert drift.min() > 1e-3  # ESD holds only the sum of guidance and unconditional prediction
    assert torch.equal(uncond_drift(TOY, TOY, state), torch.zeros(5, dtype=torch.float64))


def test_every_target_is_erased() -> None:
    both = Request(target=(Concept.of("cat"), Concept.of("bird")), anchor=(None, None))
    wide = {"group": "cross_kv", "steps": 600, "pool": 6, "batch": 2, "walk": 4, "lr": 1e-2}

    def miss(edited: Generator, word: str) -> float:
        u, c = TOY.encode([""]).subject[0], TOY.encode([word]).subject[0]
        old, new = TOY.weight(CROSS), edited.weight(CROSS)
        return float((new @ c - (2 * old @ u - old @ c)).abs().max())

    edited, _ = train(ESD(**wide), both)
    assert miss(edited, "cat") < 1e-2 and miss(edited, "bird") < 1e-2
    one, _ = train(ESD(**wide), CAT)
    assert miss(one, "cat") < 1e-2 < miss(one, "bird")


@pytest.mark.parametrize("group", ["cross_attention", "non_cross_attention", "cross_kv", "all"])
def test_only_the_group_changes_and_the_teacher_stays(group: str) -> None:
    model = load("tiny-unet")

    def digest() -> str:
        tensors = model.network.state_dict().values()
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    before = digest()
    method = ESD(**{**SHORT, "group": group, "steps": 1})
    changed = method.erase(model, Request.of("strawberry"), Run()).deltas.keys()
    assert changed and changed <= model.select(group).keys()
    assert digest() == before
    outside = model.select("all").keys() - model.select(group).keys()
    assert outside or group == "all"
    assert not changed & outside


def test_groups_of_stable_diffusion_1_have_their_known_sizes() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    sizes = {f"unet.{name}": parameter.numel() for name, parameter in unet.named_parameters()}
    kv, cross, others = (unet_paths(unet, group) for group in ("cross_kv", "cross_attention", "non_cross_attention"))
    assert (len(kv), sum(sizes[path] for path in kv)) == (32, 19_169_280)
    assert len({path.partition(".attn2.")[0] for path in cross}) == 16
    assert set(kv) < set(cross) and not set(cross) & set(others)
    assert set(sizes) - set(cross) - set(others) == {
        path for path in sizes if path.startswith(("unet.conv_out.", "unet.conv_norm_out.", "unet.time_embedding."))
    }


def test_unknown_group_and_empty_pools_are_refused() -> None:
    with pytest.raises(ValidationError, match="noxattn"):
        TypeAdapter(ESD).validate_python({"group": "noxattn"})
    assert TypeAdapter(ESD).validate_python({"group": "all"}) == ESD(group="all")
    for field, value in (("batch", 0), ("walk", 0), ("steps", 0)):
        with pytest.raises(InputError, match=f"{field} is 0"):
            train(ESD(**{**SHORT, field: value}))
    with pytest.raises(InputError, match="pool is 1; legal: 2"):
        two = Request(target=(Concept.of("cat"), Concept.of("bird")), anchor=(None, None))
        train(ESD(**{**SHORT, "pool": 1}), two)


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-unet-v"])
def test_lessons_carry_the_noise_level_of_their_states(name: str) -> None:
    """With the exact denoiser of a world whose only picture is zero, x_t is pure noise of variance 1 − alpha_bar(t)."""
    model = load(name)
    alphas = model.scheduler.alphas_cumprod
    velocity = model.scheduler.config.prediction_type == "v_prediction"

    def exact(module: object, inputs: tuple[Tensor, ...], output: object) -> tuple[Tensor]:
        a = alphas[inputs[1].long()].reshape(-1, 1, 1, 1)
        eps = inputs[0] / (1 - a).sqrt()
        return (a.sqrt() * eps if velocity else eps,)

    walk = Walk(prompts=model.encode(["cat"]), batch=48, guidance_scale=3.0, steps=10)

    def nothing(state: State, which: Tensor) -> Goals:
        return ()

    world = model.view(hooks=[Hook("unet", exact)])
    state = walk.pooled(world, nothing, Run(), size=48)(0).state
    step = (state.t * len(alphas)).round().long()
    power = state.x.square().flatten(1).mean(1)
    assert len(step.unique()) > 5
    assert (power / (1 - alphas[step])).mean() == pytest.approx(1, abs=0.05)
    wrong = (step + len(alphas) // 10).clamp(max=len(alphas) - 1)  # what a sampler that stops one step late would give
    assert abs((power / (1 - alphas[wrong])).mean() - 1) > 0.1


def test_pool_holds_the_teachers_states_and_its_goals_there() -> None:
    walk = Walk(prompts=TOY.encode(["cat", "bird"]), batch=3, guidance_scale=3.0, steps=4)

    def teach(state: State, which: Tensor) -> Goals:
        return (TOY.predict(state, walk.prompts.take(which)),)

    lesson = walk.pooled(TOY, teach, Run(), size=40)
    for step in range(3):
        now = lesson(step)
        torch.testing.assert_close(now.goals, teach(now.state, now.which))
        assert not torch.equal(now.state.x, lesson(step + 1).state.x)
    assert {int(row) for step in range(5) for row in lesson(step).which} == {0, 1}


def test_student_trajectory_follows_the_student_and_the_teachers_does_not() -> None:
    walk = Walk(prompts=TOY.encode(["cat"]), batch=3, guidance_scale=3.0, steps=4)
    edited = TOY.view(weights={SELF: TOY.weight(SELF) * 1.1})

    def nothing(state: State, which: Tensor) -> Goals:
        return ()

    base, moved = walk.fresh(lambda: TOY, nothing, Run()), walk.fresh(lambda: edited, nothing, Run())
    assert torch.equal(base(3).state.x, walk.fresh(lambda: TOY, nothing, Run())(3).state.x)
    assert not torch.equal(base(3).state.x, moved(3).state.x)
    own, frozen = (walk.lessons(TOY, lambda: edited, nothing, Run(), fresh=fresh, size=5) for fresh in (True, False))
    assert torch.equal(own(3).state.x, moved(3).state.x)
    assert torch.equal(frozen(3).state.x, walk.pooled(TOY, nothing, Run(), size=5)(3).state.x)
    fresh, _ = train(ESD(**{**SHORT, "trajectory": "student", "group": "all"}))
    pooled, _ = train(ESD(**{**SHORT, "trajectory": "teacher", "group": "all"}))
    assert not torch.equal(fresh.weight(SELF), pooled.weight(SELF))
