"""What the certificates say must be so, and must be said of nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.records import Certificate
from expunge.core.registry import catalogue, find
from expunge.models.load import load
from expunge.ops.reading import edit_between, residuals
from expunge.ops.rows import row_pairs
from expunge.stages.certify import statements

CAT = Request.of("cat", anchor="dog", retain=("car", "blue car"))
SHORT = {"steps": 1, "pool": 2, "walk": 2, "batch": 1}
CLOSED = {"locality", "residual", "drift", "subspace", "inversion", "conditioning"}


def certified(model: Generator, erased: Generator, request: Request = CAT) -> dict[str, Certificate]:
    return {each.name: each for each in statements(model, erased, request)}


def erased(model: Generator, name: str, request: Request = CAT, **fields: object) -> Generator:
    return find("methods", name)(**fields).erase(model, request, Run()).on(model)


def edited(model: Generator, m: Tensor) -> Generator:
    """Every text-reading layer W becomes W M."""
    sites = model.sites("text_in")
    return model.view(weights={site.path: (site.weight.double() @ m).to(site.weight) for site in sites})


@pytest.fixture(scope="module")
def model() -> Generator:
    return load("tiny-unet")


def test_names_are_those_of_the_files(model: Generator) -> None:
    assert set(catalogue("certificates")) == CLOSED == certified(model, erased(model, "uce")).keys()


def test_nothing_is_said_of_an_edit_that_changes_nothing(model: Generator) -> None:
    assert statements(model, model, CAT) == []


def test_trained_layers_beyond_the_text_reading_ones_leave_locality_alone(model: Generator) -> None:
    found = certified(model, erased(model, "esd", **SHORT))
    assert found.keys() == {"locality"}
    assert found["locality"].value > len(model.sites("text_in"))


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sdxl", "tiny-flux", "tiny-sd3"])
def test_every_family_with_text_reading_layers_is_certified(name: str) -> None:
    base = load(name)
    found = certified(base, erased(base, "uce", ridge=0.5))
    assert found.keys() == CLOSED
    assert all(math.isfinite(each.value) and each.assumptions for each in found.values())


def test_residual_is_the_worst_layer_by_an_independent_count(model: Generator) -> None:
    view = erased(model, "uce", ridge=0.5)
    target, anchor = model.encode(["cat"]), model.encode(["dog"])
    worst = 0.0
    for old, new in zip(model.sites("text_in"), view.sites("text_in"), strict=True):
        for c, a in row_pairs(target, anchor, "tokens", "tail"):
            goal = a.double() @ old.weight.double().T
            left = c.double() @ new.weight.double().T - goal
            apart = c.double() @ old.weight.double().T - goal
            worst = max(worst, float(left.norm() / apart.norm()))
    assert certified(model, view)["residual"].value == pytest.approx(worst, rel=1e-9)
    untouched = edit_between(model, edited(model, torch.eye(old.weight.shape[1]).double() * (1 + 1e-6)), CAT)
    assert max(residuals(untouched.readings[0])) == pytest.approx(1, abs=1e-3)


def test_smaller_ridge_lowers_the_residual_and_retained_prompts_lower_the_drift(model: Generator) -> None:
    values = [certified(model, erased(model, "uce", ridge=ridge))["residual"].value for ridge in (10.0, 0.5, 1e-3)]
    assert values[0] > values[1] > values[2]
    free, held = (certified(model, erased(model, "uce", ridge=0.5, retain_weight=w))["drift"].value for w in (0.0, 9.0))
    assert held < 0.5 * free


def test_subspace_bounds_every_embedding_off_the_target_and_one_attains_it(model: Generator) -> None:
    view = erased(model, "uce", ridge=0.5)
    bound = certified(model, view)["subspace"].value
    rows = torch.cat([c for c, _ in edit_between(model, view, CAT).readings[0].targets])
    basis = torch.linalg.svd(rows, full_matrices=False)[2]
    basis = basis[torch.linalg.svdvals(rows) > 1e-5 * torch.linalg.svdvals(rows)[0]]
    seen, within = 0.0, 0.0
    rng = torch.Generator().manual_seed(0)
    for old, new in zip(model.sites("text_in"), view.sites("text_in"), strict=True):
        change, size = (new.weight - old.weight).double(), torch.linalg.matrix_norm(old.weight.double(), 2)
        off = change - (change @ basis.T) @ basis
        seen = max(seen, float(torch.linalg.matrix_norm(off, 2) / size))
        e = torch.randn(64, change.shape[1], generator=rng, dtype=torch.float64)
        e = e - (e @ basis.T) @ basis
        within = max(within, float(((e @ change.T).norm(dim=1) / e.norm(dim=1)).max() / size))
    assert within <= bound * (1 + 1e-9)
    assert seen == pytest.approx(bound, rel=1e-6)


def test_regular_edits_are_inverted_and_projections_are_not(model: Generator) -> None:
    regular = certified(model, erased(model, "uce", ridge=0.5))
    assert regular["inversion"].value < 1e-4
    assert regular["conditioning"].value > 1e-3
    wide = model.sites("text_in")[0].weight.shape[1]
    c, a = edit_between(model, erased(model, "uce"), CAT).readings[0].targets[0]
    axis = torch.nn.functional.normalize((c - a)[0], dim=0)
    flat = certified(model, edited(model, torch.eye(wide, dtype=torch.float64) - torch.outer(axis, axis)))
    assert flat["inversion"].value > 0.05
    assert flat["conditioning"].value < 1e-6
    assert "beyond the weights' precision" in flat["conditioning"].statement


def test_no_embedding_found_by_descent_beats_the_inversion(model: Generator) -> None:
    wide = model.sites("text_in")[0].weight.shape[1]
    c, a = edit_between(model, erased(model, "uce"), CAT).readings[0].targets[0]
    axis = torch.nn.functional.normalize((c - a)[0], dim=0)
    view = edited(model, torch.eye(wide, dtype=torch.float64) - torch.outer(axis, axis))
    reading = edit_between(model, view, CAT).readings[0]
    old, new = (torch.cat([weight.double() for weight in side]) for side in (reading.old, reading.new))
    goal, apart = c @ old.T, ((c - a) @ old.T).norm()
    e = c.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([e], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def miss() -> Tensor:
        optimizer.zero_grad()
        loss = (e @ new.T - goal).square().sum() / apart**2
        loss.backward()
        return loss

    optimizer.step(miss)
    reached = float((e.detach() @ new.T - goal).norm() / apart)
    bound = certified(model, view)["inversion"].value
    assert bound * (1 - 1e-6) <= reached <= 1.05 * bound


def test_conditioning_reads_the_matrix_and_is_silent_where_there_is_none(model: Generator) -> None:
    sites = model.sites("text_in")
    wide = sites[0].weight.shape[1]
    scales = torch.ones(wide, dtype=torch.float64)
    scales[3] = 0.125
    found = certified(model, edited(model, torch.diag(scales)))
    assert found["conditioning"].value == pytest.approx(0.125, rel=1e-4)
    assert "condition number 8" in found["conditioning"].statement
    rng = torch.Generator().manual_seed(1)
    noise = {site.path: site.weight + 0.01 * torch.randn(site.weight.shape, generator=rng) for site in sites}
    assert "conditioning" not in certified(model, model.view(weights=noise))


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sd3"])
def test_layers_that_hear_part_of_the_space_are_conditioned_by_that_part(name: str) -> None:
    base = load(name)
    site = next(site for site in base.sites("text_in") if site.weight.shape[0] < site.weight.shape[1])
    wide = site.weight.shape[1]
    heard = torch.linalg.svd(site.weight.double(), full_matrices=True)[2]
    loud, deaf = heard[0], heard[-1]
    assert float((site.weight.double() @ deaf).norm()) < 1e-5

    def changed(axis: Tensor, left: float) -> Generator:
        m = torch.eye(wide, dtype=torch.float64) - (1 - left) * torch.outer(axis, axis)
        return base.view(weights={site.path: (site.weight.double() @ m).to(site.weight)})

    found = certified(base, changed(loud, 0.25))["conditioning"]
    assert found.value == pytest.approx(0.25, rel=1e-3) and "condition number 4" in found.statement
    assert "conditioning" not in certified(base, changed(deaf, 0.25))  # nothing hears it: nothing changed


def test_a_target_that_reads_as_its_anchor_has_no_residual_to_speak_of(model: Generator) -> None:
    edit = edit_between(model, erased(model, "uce"), CAT)
    (c, _) = edit.readings[0].targets[0]
    same = replace(edit, readings=(replace(edit.readings[0], targets=((c, c),)),))
    names = ("residual", "inversion", "drift", "subspace")
    said = {name: find("certificates", name)().certify(same) is not None for name in names}
    assert said == {"residual": False, "inversion": False, "drift": True, "subspace": True}
