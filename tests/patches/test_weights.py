import pytest
import torch

from expunge.core.errors import InputError
from expunge.core.patch import Patch
from expunge.models.load import load
from expunge.patches.weights import WeightPatch, added


@pytest.fixture(scope="module")
def model():
    return load("tiny-unet")


@pytest.fixture(scope="module")
def patch(model):
    rng = torch.Generator().manual_seed(0)
    chosen = model.select("cross_kv")
    return WeightPatch({path: torch.randn(weight.shape, generator=rng) * 0.1 for path, weight in chosen.items()})


def picture(model):
    return model.generate(["red cat"], seeds=[3], guidance_scale=2.0, steps=2)


def test_it_is_a_patch(patch):
    assert isinstance(patch, Patch)


def test_the_view_sees_the_sum_and_the_base_does_not(model, patch):
    before = picture(model)
    view = patch.on(model)
    for path, delta in patch.deltas.items():
        assert torch.equal(view.weight(path), model.weight(path) + delta)
        assert torch.equal(model.weight(path), model.network.get_parameter(path))
    assert not torch.equal(picture(view), before)
    assert torch.equal(picture(model), before)


def test_patches_stack(model, patch):
    twice = patch.on(patch.on(model))
    for path, delta in patch.deltas.items():
        torch.testing.assert_close(twice.weight(path), model.weight(path) + 2 * delta)


def test_restore_gives_the_same_patch(patch):
    again = WeightPatch.restore(patch.tensors(), patch.meta())
    assert again.deltas.keys() == patch.deltas.keys()
    assert all(torch.equal(again.deltas[path], delta) for path, delta in patch.deltas.items())


def test_foreign_paths_and_shapes_are_refused(model, patch):
    path, delta = next(iter(patch.deltas.items()))
    with pytest.raises(InputError, match="transformer"):
        WeightPatch({"transformer.x.weight": delta}).on(model)
    with pytest.raises(InputError, match="has shape"):
        WeightPatch({path: delta[:-1]}).on(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_changes_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="not finite"):
        WeightPatch({"unet.w": torch.tensor([1.0, bad])})


def test_half_precision_weights_are_summed_in_float32():
    """One bf16 ulp below 1 is 1/256: two halves of it must not be lost one by one before the sum is rounded."""
    weight = torch.ones(1, dtype=torch.bfloat16)
    total = added(weight, torch.tensor([0.0078125 * 0.75]), "w")
    assert total.dtype == torch.bfloat16
    assert total.item() == torch.tensor(1 + 0.0078125 * 0.75).to(torch.bfloat16).item() != 1.0
