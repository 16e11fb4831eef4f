"""Faults of EraseAnything's released code, each an option: what it does that the default must not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Run
from expunge.core.generator import Hook, State
from expunge.methods.finetune import erase_anything
from expunge.methods.finetune.erase_anything import EraseAnything
from expunge.models.load import load
from expunge.models.mmdit import MMDiTGenerator
from expunge.ops.asked import Asked, Unrelated, turns
from expunge.ops.contrast import near_contrast, reverse_contrast
from expunge.ops.student import LowRankStudent
from expunge.ops.tap import joint_attention, norms, tapped
from expunge.ops.trajectory import Walk
from expunge.ops.wording import Shown

FLOWS = ("tiny-sd3", "tiny-flux", "tiny-flux-distilled")
BRIEF = {"steps": 5, "walk": 3, "pool": 1, "batch": 1, "pictures": 3, "lr": 1e-2, "embedded_scales": (3.5,)}
BERRY = Request.of("strawberry", anchor="cat")
FAULTS = {
    "teacher": "drifting",
    "levels": "unrelated",
    "attention": "norms",
    "kept": "target",
    "contrast": "near",
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_state(model: Any, size: int = 2) -> State:
    return model.visit(model.encode(["guitar"] * size), rng=Run().rng("state"), guidance_scale=2.0, steps=6)


def factors(**told: Any) -> dict[str, Tensor]:
    return EraseAnything(**{**BRIEF, "attention_weight": 1.0, **told}).erase(load("tiny-flux"), BERRY, Run()).tensors()


def test_each_fault_teaches_something_else_and_none_is_a_default() -> None:
    plain = factors()
    assert all(getattr(EraseAnything(), option) != fault for option, fault in FAULTS.items())
    for option, fault in FAULTS.items():
        other = factors(**{option: fault})
        assert any(not torch.equal(other[path], plain[path]) for path in plain), option


@pytest.mark.parametrize("name", FLOWS)
def test_goals_stay_when_the_factors_are_perturbed(name: str) -> None:
    """The frozen teacher: what it says is the same bits after the student moved, the student's not."""
    model = load(name)
    paths = [f"{path}.add_{part}_proj.weight" for path in joint_attention(model) for part in "qk"]
    student = LowRankStudent.of(model, paths, rank=2, rng=Run().rng("factors"))
    lines = turns(BERRY, "a photo of {}", 0.0, 2, Run().rng("lines"))
    asked, state, which = Asked.of(model, lines, ("tree", "chair"), (3.5,)), some_state(model), torch.arange(2)

    def said() -> list[tuple[Tensor, ...]]:
        with torch.no_grad():
            return [asked.said(teacher, state, which, "all") for teacher in (model, student.view())]

    before = said()
    assert all(torch.equal(one, two) for one, two in zip(*before, strict=True))  # B = 0
    with torch.no_grad():
        for factor in student.parameters:
            factor.add_(drawn(*factor.shape))
    (frozen, drifted), (own, _) = said(), before
    assert all(torch.equal(one, two) for one, two in zip(frozen, own, strict=True))
    assert all((one - two).norm() > 1e-3 * two.norm() for one, two in zip(drifted, own, strict=True))


@pytest.mark.parametrize("teacher", ["frozen", "drifting"])
def test_a_drifting_teacher_s_goal_runs_away(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training: the frozen one's goal is n − (c − n) of the base at every step, the other's at the first alone."""
    model, asked, goals = load("tiny-flux"), [], []

    def seen(view: Any, state: State, row: Shown, blocks: Any) -> Any:
        asked.append((state, row))
        return tapped(view, state, row, blocks)

    def apart(self: Any, pred: Tensor, goal: Tensor, plain: Any = MMDiTGenerator.distance) -> Tensor:
        goals.append(goal.detach())
        return plain(self, pred, goal)

    monkeypatch.setattr(erase_anything, "tapped", seen)
    monkeypatch.setattr(MMDiTGenerator, "distance", apart)
    EraseAnything(**BRIEF, teacher=teacher, shuffle=0.0).erase(model, BERRY, Run())
    monkeypatch.undo()
    assert len(asked) == len(goals) == 5  # one a step; the odd ones' are the flow's
    missed = []
    for (state, row), goal in list(zip(asked, goals, strict=True))[::2]:
        n, c = model.predict(state, model.encode(["a photo of cat"])), model.predict(state, row.cond)
        missed.append(float((goal - (2 * n - c)).norm() / (c - n).norm()))
    assert missed[0] < 1e-4
    assert max(missed) < 1e-4 if teacher == "frozen" else min(missed[1:]) > 0.05


def test_unrelated_states_are_noise_at_any_level() -> None:
    """Pure noise whatever t says, where an own state holds 1 − t of what its path has come to."""
    model = load("tiny-flux")
    walk = {"prompts": model.encode(["cat"] * 300), "batch": 1, "guidance_scale": 1.0, "steps": 4}
    which = torch.arange(300)
    own, other = (kind(**walk).visited(model, which, Run().rng("visit")) for kind in (Walk, Unrelated))
    start = torch.randn(300, *model.latent, generator=Run().rng("visit"))
    assert torch.equal(other.x, start) and len(other.t.unique()) == 300
    assert 0 <= other.t.min() < 0.05 and 0.95 < other.t.max() < 1 and abs(float(other.t.mean()) - 0.5) < 0.06
    moved = (own.x - start).flatten(1).norm(dim=1)
    assert len(own.t.unique()) == 4 and (moved[own.t < 1] > 0.1).all() and (moved[own.t == 1] == 0).all()


@pytest.mark.parametrize("name", FLOWS)
def test_head_maps_are_the_ones_the_network_uses(name: str) -> None:
    """With the image's values silenced, what leaves the attention is these maps times the text's values."""
    model, seen = load(name), {}
    path = joint_attention(model)[0]
    hooks = [
        Hook(f"{path}.to_v", lambda module, inputs, output: torch.zeros_like(output)),
        Hook(f"{path}.add_v_proj", lambda module, inputs, output: seen.__setitem__("values", output)),
        Hook(f"{path}.to_out.0", lambda module, inputs, output: seen.__setitem__("image", inputs[0])),
        Hook(f"{path}.to_add_out", lambda module, inputs, output: seen.__setitem__("text", inputs[0])),
    ]
    cond = model.encode(["red cat"] * 2)
    _, tap = tapped(model.view(hooks=hooks), some_state(model), Shown(cond, cond.mask), "all")
    maps = tap.head_maps()
    length = maps.shape[-1]
    values = seen["values"].unflatten(-1, (maps.shape[2], -1)).transpose(1, 2)
    mixed = (maps[0] @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, torch.cat([seen["text"], seen["image"]], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[:, :, :, length:].mean((0, 2)), tap.text_maps())


def test_norms_count_heads_by_their_length_and_text_rows_too() -> None:
    maps, marked = drawn(2, 1, 3, 6, 4).softmax(-1), torch.tensor([[False, True, True, False]])
    by_hand = sum(maps[k, 0, :, i, j].norm() for k in range(2) for i in range(6) for j in (1, 2)) / 2
    torch.testing.assert_close(norms(maps, marked), by_hand[None])
    quiet = maps.clone()
    quiet[:, :, :, :2] = 0  # the text's own rows
    assert norms(quiet, marked) < norms(maps, marked)


def test_near_contrast_draws_to_nothing() -> None:
    """Its slope lies in the plane of f and near, so no far feature pulls; that of the paper's leaves it."""
    f, near, far = drawn(2, 6).requires_grad_(), drawn(2, 6, seed=1), drawn(2, 3, 6, seed=2)

    def outside(contrast: Any) -> float:
        slope = torch.autograd.grad(contrast(f, near, far, 0.5).sum(), f)[0]
        plane = torch.linalg.qr(torch.stack([f.detach(), near], 2)).Q
        rest = slope - (plane @ (plane.mT @ slope[..., None]))[..., 0]
        return float(rest.norm() / slope.norm())

    assert outside(near_contrast) < 1e-5 and outside(reverse_contrast) > 0.1
    base = near_contrast(f, near, far, 0.5)
    assert (near_contrast(f + 0.5 * near, near, far, 0.5) > base).all()
    keys = torch.nn.functional.normalize(torch.cat([f[:, None], far], 1), dim=-1)
    logits = torch.einsum("bn,bkn->bk", torch.nn.functional.normalize(near, dim=-1), keys) / 0.5
    torch.testing.assert_close(base, logits.log_softmax(1)[:, 0])


@pytest.mark.parametrize(("kept", "shown"), [("others", "guitar"), ("target", "strawberry")])
def test_pictures_show_what_is_kept(kept: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def draw(self: Any, prompts: list[str], plain: Any = MMDiTGenerator.generate, **how: Any) -> Tensor:
        asked.extend(prompts)
        return plain(self, prompts, **how)

    monkeypatch.setattr(MMDiTGenerator, "generate", draw)
    request = Request.of("strawberry", anchor="cat", retain=("guitar",))
    EraseAnything(**BRIEF, kept=kept).erase(load("tiny-flux"), request, Run())
    assert asked == [f"a photo of {shown}"] * 3
