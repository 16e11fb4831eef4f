"""What must hold for ANT, and what must not."""

import pytest
import torch

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.methods.finetune.ant import ANT
from expunge.models.load import load
from expunge.ops import fit as fitting
from expunge.ops.fusion import fused, window_gram
from expunge.ops.rows import pick_state
from expunge.ops.saliency import common
from expunge.ops.student import Student
from expunge.ops.trajectory import predict_each
from expunge.patches.lowrank import product
from expunge.patches.operator import SharedEdit

BRIEF = {"steps": 2, "pool": 8, "walk": 4, "maps": 1, "batch": 8}
BERRY = Request.of("strawberry")
EVEN = {"early": 1.0, "uncond_late": 0.1, "uncond_early": 0.1}


def first_loss(monkeypatch: pytest.MonkeyPatch, **settings: float) -> tuple[float, Student]:
    """The loss at the frozen weights, and the student after one backward pass of it."""
    seen = {}

    def once(student, loss, run, *, steps, lr, state):
        value = loss(0)
        value.backward()
        seen["found"] = (value.item(), student)

    monkeypatch.setattr("expunge.methods.finetune.ant.fit", once)
    ANT(**{**BRIEF, "maps": 0, **settings}).erase(load("tiny-unet"), BERRY, Run())
    return seen["found"]


def test_early_states_and_the_empty_prompt_cost_nothing_at_the_start(monkeypatch):
    nothing, student = first_loss(monkeypatch, turn=0.0)
    assert nothing < 1e-15
    assert all(p.grad is None or p.grad.abs().max() < 1e-8 for p in student.parameters)


def test_the_late_loss_at_the_start_is_one_plus_eta_squared_guidances(monkeypatch):
    once, _ = first_loss(monkeypatch, turn=2.0, strength=0.0)
    assert once > 0
    for strength in (0.5, 1.0, 2.0):
        assert first_loss(monkeypatch, turn=2.0, strength=strength)[0] == pytest.approx((1 + strength) ** 2 * once)


def test_the_mirrored_time_direction_erases_where_the_paper_keeps(monkeypatch):
    late, _ = first_loss(monkeypatch, turn=0.5)
    mirrored, _ = first_loss(monkeypatch, turn=0.5, reverse_time=True)
    both, _ = first_loss(monkeypatch, turn=2.0)
    assert 0 < late < both
    assert late + mirrored == pytest.approx(both)


def steered(reverse_time: bool) -> list[tuple[float, float]]:
    """Train 50 steps with t' = 0.5; on new states, early then late, compare with the frozen model's prediction.

    ‖f(c) − c_0‖² / ‖c_0 − u‖², which is (1 + eta)² = 4 where the direction is fully reversed, and the cosine of
    f(c) − u with c_0 − u.
    """
    model = load("tiny-unet")
    method = ANT(steps=50, pool=64, walk=10, maps=0, batch=8, lr=1e-3, turn=0.5, reverse_time=reverse_time, **EVEN)
    student = method.erase(model, BERRY, Run()).on(model)
    states = model.visit(model.encode(["strawberry"] * 64), rng=Run(seed=9).rng("new"), guidance_scale=3.0, steps=10)
    found = []
    for side in (states.t >= 0.5, states.t < 0.5):
        state = pick_state(states, side.nonzero()[:, 0])
        rows = [model.encode([text] * len(state.x)) for text in ("", "strawberry")]
        with torch.no_grad():
            (u, c), (_, told) = predict_each(model, state, rows), predict_each(student, state, rows)
        apart = model.distance(told, c).mean() / model.distance(c, u).mean()
        found.append((float(apart), float(torch.cosine_similarity((told - u).flatten(1), (c - u).flatten(1)).mean())))
    return found


@pytest.mark.parametrize("reverse_time", [False, True])
def test_training_keeps_early_states_and_reverses_late_ones_and_mirrored_the_opposite(reverse_time):
    early, late = steered(reverse_time)
    (kept, along), (turned, against) = (late, early) if reverse_time else (early, late)
    assert kept < 1 < 2 < turned
    assert against < -0.3 < 0.3 < along


def test_the_unconditional_prediction_is_taught(monkeypatch):
    """Move the student, then ask the unconditional terms alone for a gradient; the released code has none there."""

    def moved(student, loss, run, *, steps, lr, state):
        with torch.no_grad():
            for p in student.parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        loss(0).backward()
        found.append(sum(float(p.grad.abs().sum()) for p in student.parameters if p.grad is not None))

    monkeypatch.setattr("expunge.methods.finetune.ant.fit", moved)
    found: list[float] = []
    for weight in (0.0, 0.5):
        ANT(**{**BRIEF, "maps": 0}, early=0.0, turn=0.0, uncond_late=weight, uncond_early=weight).erase(
            load("tiny-unet"), BERRY, Run()
        )
    assert found[0] == 0
    assert found[1] > 0
    assert fitting.fit is not moved


def test_masks_intersect_and_what_is_outside_keeps_its_bits():
    rng = torch.Generator().manual_seed(0)
    masks = [(torch.rand(30, generator=rng) < 0.7,) for _ in range(4)]
    sizes = [int(common(masks[:n])[0].sum()) for n in (1, 2, 3, 4)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    with pytest.raises(InputError, match="no scalar in common"):
        common([(torch.tensor([True, False]),), (torch.tensor([False, True]),)])
    model = load("tiny-unet")
    kept = ANT(**{**BRIEF, "share": 0.2}).erase(model, BERRY, Run())
    total = sum(weight.numel() for weight in model.select("all").values())
    assert 0 < sum(int((delta != 0).sum()) for delta in kept.deltas.values()) <= round(0.2 * total)


def test_fusion_without_ridge_gives_the_adapters_outputs_on_their_own_rows():
    """One concept whose rows span the width: W* e = (W + B A) e for every one of them."""
    model = load("tiny-unet")
    site = model.sites("text_in")[0]
    width = site.weight.shape[1]
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(3 * width, width, generator=rng, dtype=torch.float64)
    pair = tuple(torch.randn(shape, generator=rng) for shape in ((2, width), (site.weight.shape[0], 2)))
    gram, none = rows.T @ rows, torch.zeros(0, width, dtype=torch.float64)
    edit, factors = fused(SharedEdit(none, none), [(gram, {site.path: pair})], torch.zeros_like(gram), 0.0)
    wanted, got = product(*(x.double() for x in pair)), product(*factors[site.path])
    torch.testing.assert_close(got @ rows.T, wanted @ rows.T)
    assert not edit.delta(site.weight).any()
    held, _ = fused(SharedEdit(none, none), [(gram, {site.path: pair})], 100 * gram, 0.0)[::-1]
    assert product(*held[site.path]).norm() < 0.02 * wanted.norm()


def test_multi_leaves_one_adapter_of_all_ranks_and_only_where_text_is_read():
    model = load("tiny-unet")
    request = Request(target=(Concept.of("strawberry"), Concept.of("cat")), anchor=(None, None))
    patch = ANT(**BRIEF, mode="multi", rank=2, lr=1e-2).erase(model, request, Run())
    sites = {site.path for site in model.sites("text_in")}
    assert set(patch.factors) == sites
    assert all(down.shape[0] == 4 for down, _ in patch.factors.values())
    assert window_gram(model, []).abs().sum() == 0
    with pytest.raises(InputError, match="mode is 'multi'"):
        ANT(**BRIEF, mode="multi").erase(load("tiny-flux"), BERRY, Run())
