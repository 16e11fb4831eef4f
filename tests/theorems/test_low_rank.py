"""ESD and All but One with a rank: LoRA factors over the linear maps of a group instead of whole tensors."""

from collections import defaultdict

import pytest
from torch import nn

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.registry import find
from expunge.models.load import load
from expunge.patches.lowrank import LowRankPatch
from expunge.patches.weights import WeightPatch

BRIEF = {"pool": 4, "walk": 3, "batch": 2, "group": "cross_attention"}
ASKED = Request.of("cat", anchor="dog", retain=("guitar",))
EVERYWHERE = pytest.mark.parametrize("model", ["tiny-unet", "tiny-flux", "tiny-flux-distilled"])
BOTH = pytest.mark.parametrize("name", ["esd", "all_but_one"])


def trained(name: str, model: str, **options: float) -> tuple[WeightPatch | LowRankPatch, list[float]]:
    log = defaultdict(list)
    eraser: Eraser = find("methods", name)(**BRIEF, **options)
    patch = eraser.erase(load(model), ASKED, Run(log=lambda key, step, value: log[key].append(value)))
    return patch, log["loss"]


@BOTH
@EVERYWHERE
def test_factors_lie_over_the_groups_linear_maps_and_nothing_else_moves(name: str, model: str) -> None:
    base, (patch, _) = load(model), trained(name, model, rank=2, steps=2, lr=1e-3)
    chosen = set(base.select("cross_attention"))
    linear = {f"{path}.weight" for path, module in base.network.named_modules() if isinstance(module, nn.Linear)}
    assert isinstance(patch, LowRankPatch) and set(patch.factors) <= chosen & linear
    assert {down.shape[0] for down, _ in patch.factors.values()} == {2}
    assert set(trained(name, model, steps=2, lr=1e-3)[0].tensors()) > set(patch.factors)  # biases as well


@BOTH
@EVERYWHERE
def test_training_starts_where_whole_tensors_start_and_gets_somewhere(name: str, model: str) -> None:
    """B = 0 is the base, so the first loss is that of whole tensors on the same states, and steps lower it."""
    _, whole = trained(name, model, steps=1)
    _, thin = trained(name, model, rank=4, steps=30, lr=1e-2)
    assert thin[0] == pytest.approx(whole[0], rel=1e-5)
    assert min(thin[-4:]) < 0.9 * thin[0]


@BOTH
def test_a_rank_below_zero_and_a_group_without_linear_maps_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="rank is -1; legal: 0 for whole tensors, and above"):
        trained(name, "tiny-unet", rank=-1)
    kind, select = type(load("tiny-unet")), type(load("tiny-unet")).select
    monkeypatch.setattr(
        kind, "select", lambda self, group: {k: v for k, v in select(self, group).items() if k.endswith("bias")}
    )
    with pytest.raises(InputError, match="has no matrix of a linear map; legal: rank 0"):
        trained(name, "tiny-unet", rank=1)
