"""One operator for all layers, in kilobytes: what it does, what it is stored as, and which models take it."""

import copy
from typing import Any

import pytest
import torch

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.patch import Patch
from expunge.methods.closed_form.project import Project
from expunge.methods.closed_form.rece import RECE
from expunge.methods.closed_form.trce import TRCE
from expunge.methods.closed_form.uce import UCE
from expunge.models.load import load
from expunge.models.tiny import tiny_pipeline
from expunge.models.unet import UNetGenerator
from expunge.ops.ridge import shared_edit
from expunge.patches.operator import Equations, SharedEdit, joint
from expunge.patches.shared import Part, SharedPatch

REQUEST = Request.of("red cat", anchor="dog", retain=("car",))
F64 = torch.float64


def erase(model: Any, method: Any, request: Request = REQUEST) -> SharedPatch:
    patch = method.erase(model, request, Run())
    assert isinstance(patch, SharedPatch)
    return patch


@pytest.fixture(scope="module")
def model() -> UNetGenerator:
    return load("tiny-unet")


def twin(seed: int = 1, text: bool = True) -> UNetGenerator:
    """Another model: other weights everywhere, the text encoder of `tiny-unet` if so asked."""
    other = tiny_pipeline("tiny-unet", seed=seed)
    if text:
        other.text_encoder = tiny_pipeline("tiny-unet").text_encoder
    return UNetGenerator(other, "twin")


def random_operator(seed: int, rows: int, width: int = 32) -> SharedEdit:
    rng = torch.Generator().manual_seed(seed)
    return SharedEdit(*(0.1 * torch.randn(rows, width, generator=rng, dtype=F64) for _ in range(2)))


def test_it_is_a_patch(model: UNetGenerator) -> None:
    assert isinstance(erase(model, UCE()), Patch)


@pytest.mark.parametrize("method", [UCE(ridge=0.5), UCE(mode="uce2025", ridge=0.5), RECE(epochs=1), TRCE(), Project()])
def test_what_comes_back_from_storage_gives_the_same_weights_bit_for_bit(model: UNetGenerator, method: Any) -> None:
    patch = erase(model, method)
    again = SharedPatch.restore(patch.tensors(), patch.meta())
    assert again.meta() == patch.meta()
    one, two = patch.on(model), again.on(model)
    for path in patch.sites:
        assert torch.equal(one.weight(path), two.weight(path))
        assert not torch.equal(one.weight(path), model.weight(path))
    plain = patch.materialised(model)
    assert plain.deltas.keys() == patch.sites.keys()
    for path, delta in plain.deltas.items():
        torch.testing.assert_close(one.weight(path), model.weight(path) + delta, rtol=1e-6, atol=1e-6)


def test_the_equations_give_what_the_solve_gives() -> None:
    """One part or many: `joint` of what is stored is `shared_edit` of all rows, for one and for many rows."""
    rng = torch.Generator().manual_seed(3)
    keys, goals, held = (torch.randn(n, 16, generator=rng, dtype=F64) for n in (9, 9, 20))
    gain, hold = torch.rand(9, generator=rng, dtype=F64), torch.rand(20, generator=rng, dtype=F64)
    for ridge in (1e-3, 0.5, 100.0):
        whole = shared_edit(keys, goals, gain, held, hold, ridge).matrix()
        moment = ridge * torch.eye(16, dtype=F64) + (hold[:, None] * held).T @ held
        parts = [
            Equations(keys[i], goals[i], gain[i], torch.linalg.solve(moment, keys[i].T).T)
            for i in (slice(0, 2), slice(2, 7), slice(7, 9))
        ]
        for order in (parts, parts[::-1]):
            torch.testing.assert_close(joint(order).matrix(), whole, rtol=1e-9, atol=1e-11)
        assert (joint(parts[:2]).matrix() - whole).norm() > 1e-6


def test_equations_of_two_regularisers_have_no_joint_solve() -> None:
    rng = torch.Generator().manual_seed(3)
    keys, goals, held = (torch.randn(n, 16, generator=rng, dtype=F64) for n in (2, 2, 20))
    parts = [
        Equations(
            keys, goals, torch.ones(2), torch.linalg.solve(torch.eye(16, dtype=F64) + weight * held.T @ held, keys.T).T
        )
        for weight in (0.0, 1.0)
    ]
    with pytest.raises(InputError, match="no joint solve"):
        joint(parts)


def test_operators_multiply_in_order(model: UNetGenerator) -> None:
    wide = next(iter(SharedPatch.of((), model).sites.values()))[2]
    one, two = random_operator(1, 3, wide), random_operator(2, 3, wide)
    parts = [Part(targets=(name,), edits={"tokens": edit}) for name, edit in (("a", one), ("b", two))]
    path = next(iter(SharedPatch.of(parts, model).sites))
    got = SharedPatch.of(parts, model).on(model).weight(path).double()
    expected = model.weight(path).double() @ one.matrix() @ two.matrix()
    turned = model.weight(path).double() @ two.matrix() @ one.matrix()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert (got - turned).norm() > 1e-3 * (got - model.weight(path)).norm()


def test_an_edit_of_text_alone_serves_every_model_with_these_layers(model: UNetGenerator) -> None:
    """It is the very edit that erasing from the other model gives."""
    patch, other = erase(model, UCE(ridge=0.5)), twin()
    own = erase(other, UCE(ridge=0.5)).on(other)
    for path in patch.sites:
        assert torch.equal(patch.on(other).weight(path), own.weight(path))
    assert not patch.bound
    assert erase(model, Project()).bound and erase(model, RECE()).bound


def test_other_layers_are_refused_by_name(model: UNetGenerator) -> None:
    patch = erase(model, UCE())
    with pytest.raises(
        InputError, match=r"is for \d+ layers .* 'tiny-sdxl' has \d+; unet\.\S+ is .* there and .* in the edit"
    ):
        patch.on(load("tiny-sdxl"))
    fewer = copy.deepcopy(dict(patch.sites))
    path = sorted(fewer)[-1]
    del fewer[path]
    with pytest.raises(InputError, match=f"{path} is .* there and absent in the edit"):
        SharedPatch(patch.parts, fewer).on(model)


def test_half_precision_weights_are_edited_in_float64_and_keep_their_dtype() -> None:
    model = load("tiny-unet", dtype=torch.bfloat16)
    patch = erase(model, UCE(ridge=0.5))
    view = patch.on(model)
    for path in patch.sites:
        exact = model.weight(path).double() @ patch.operators["tokens"][0].matrix()
        assert view.weight(path).dtype == torch.bfloat16
        assert torch.equal(view.weight(path), exact.bfloat16())


def test_changes_that_are_not_finite_are_refused(model: UNetGenerator) -> None:
    edit = random_operator(1, 2)
    broken = SharedEdit(edit.moves, edit.duals * float("nan"))
    with pytest.raises(InputError, match="not finite"):
        SharedPatch.of([Part(targets=("a",), edits={"tokens": broken})], model)


def test_many_rows_are_kept_as_one_solved_operator(model: UNetGenerator) -> None:
    """More rows than columns: equations would be larger than the operator, which is then all there is."""
    names = ("cat", "dog", "car", "banana", "guitar", "strawberry")
    request = Request(target=tuple(Concept.of(name) for name in names), anchor=(None,) * len(names))
    patch = erase(model, UCE(ridge=0.5), request)
    assert [part.targets for part in patch.parts] == [names] and not patch.parts[0].solvable
    few = erase(model, UCE(mode="uce2025", ridge=0.5), request)
    assert [part.targets for part in few.parts] == [(name,) for name in names]
    assert all(part.solvable for part in few.parts) and len(few.groups) == 1
    assert set(patch.tensors()) == {"0.tokens.duals"}
