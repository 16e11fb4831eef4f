"""What the methods must do where text enters by two routes, layers have biases, and guidance may be an input."""

import pytest
import torch
from linear_toy import deltas as changes
from torch import Tensor
from torch.nn.functional import linear

from expunge.core.concept import Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State
from expunge.methods.closed_form.uce import UCE
from expunge.methods.finetune.all_but_one import AllButOne
from expunge.methods.finetune.esd import ESD
from expunge.models.load import load
from expunge.patches.weights import WeightPatch

FLOWS = ("tiny-sd3", "tiny-flux", "tiny-flux-distilled")
EXACT = UCE(ridge=1e-9, retain_weight=0.0)
BERRY = Request.of("strawberry", anchor="cat")


@pytest.fixture(params=FLOWS)
def model(request: pytest.FixtureRequest) -> Generator:
    return load(request.param)


def some_state(model: Generator, size: int = 4) -> State:
    cond = model.encode(["guitar"] * size)
    return model.visit(cond, rng=torch.Generator().manual_seed(3), guidance_scale=2.0, steps=6)


def inputs(model: Generator, prompt: str) -> dict[str, Tensor]:
    cond = model.encode([prompt])
    assert cond.pooled is not None
    opening = 1 if cond.bands else 0  # CLIP's first row is the same for every prompt, and sent nowhere
    return {"tokens": cond.tokens[0, opening:], "pooled": cond.pooled}


def test_uce_counts_the_bias_once(model: Generator) -> None:
    """Where the ridge leaves it free, the target's layer output becomes the anchor's, W c* + b, and not W c* + 2 b."""
    edited = EXACT.erase(model, BERRY, Run()).on(model)
    target, anchor = inputs(model, "strawberry"), inputs(model, "cat")
    sites = edited.sites("text_in")
    assert {site.reads for site in sites} == {"tokens", "pooled"}
    for site in sites:
        bias = model.weight(site.path.replace("weight", "bias"))
        assert bias.norm() > 0.1 and torch.equal(edited.weight(site.path.replace("weight", "bias")), bias)
        old = model.weight(site.path)
        after = linear(target[site.reads], site.weight, bias)
        goal, before = (linear(rows[site.reads], old, bias) for rows in (anchor, target))
        assert (after - goal).norm() < 1e-3 * (before - goal).norm()
        assert (after - (goal + bias)).norm() > 0.1 * bias.norm()


def test_uce_holds_what_it_retains_bias_or_not(model: Generator) -> None:
    """Outputs of a retained prompt stay, and nothing at all changes when nothing is erased."""
    method = UCE(retain_weight=1e6)
    edited = method.erase(model, Request.of("strawberry", anchor="cat", retain=("guitar",)), Run()).on(model)
    for site in edited.sites("text_in"):
        kept, old = inputs(model, "guitar")[site.reads], model.weight(site.path)
        assert (kept @ (site.weight - old).T).norm() < 1e-3 * (kept @ old.T).norm()
    assert changes(UCE(strength=0.0).erase(model, BERRY, Run()), model) == {}


def test_a_route_left_open_is_seen(model: Generator) -> None:
    """Both routes edited, the target's prediction is the anchor's; with either one left as it was, it is not."""
    deltas, state = changes(EXACT.erase(model, BERRY, Run()), model), some_state(model)
    target, anchor = model.encode(["strawberry"]), model.encode(["cat"])
    goal, size = model.predict(state, anchor), len(deltas)

    def missed(kept: dict[str, Tensor]) -> float:
        return float(model.distance(WeightPatch(kept).on(model).predict(state, target), goal).mean())

    assert size == 2
    open_wide, closed = missed({}), missed(dict(deltas))
    assert closed < 1e-3 * open_wide
    for path, delta in deltas.items():
        assert missed({path: delta}) > 20 * closed, f"only {path} was edited"


def test_all_modes_of_uce_edit_both_routes(model: Generator) -> None:
    for method in (
        UCE(mode="uce2025", ridge=0.5),
        UCE(technique="tensor", ridge=0.5),
        UCE(templates=("{}", "image of {}"), ridge=0.5),
    ):
        found = changes(method.erase(model, BERRY, Run()), model)
        assert {path.rpartition(".")[0].rpartition(".")[2] for path in found} == {"context_embedder", "linear_1"}


def left(model: Generator, edited: Generator, scale: float) -> float:
    """Share of the guidance toward the target that is left at an embedded scale, on the base's own states."""
    state = some_state(model, 12)
    target, uncond = (model.encode([text]).at(scale) for text in ("strawberry", ""))
    u, c, now = model.predict(state, uncond), model.predict(state, target), edited.predict(state, target)
    return float(model.distance(now, u).mean() / model.distance(c, u).mean())


@pytest.mark.parametrize("method", [ESD, AllButOne])
def test_distilled_models_are_erased_at_every_scale_taught(method: type[ESD] | type[AllButOne]) -> None:
    """strength 0 sends the target to the empty prompt, whatever the scale: at 1 and 3.5 alike, and in between too."""
    model = load("tiny-flux-distilled")
    brief = {"steps": 40, "pool": 12, "walk": 6, "batch": 4, "lr": 2e-3, "strength": 0.0}
    edited = method(**brief).erase(model, Request.of("strawberry"), Run()).on(model)
    assert all(left(model, edited, scale) < 0.5 for scale in (1.0, 2.0, 3.5))
    with pytest.raises(InputError, match="no guidance scales"):
        method(embedded_scales=()).erase(model, BERRY, Run())


def test_scales_matter_where_guidance_is_embedded_and_nowhere_else() -> None:
    brief = {"steps": 1, "pool": 2, "walk": 2, "batch": 8}

    def same(name: str, method: type[ESD] | type[AllButOne]) -> bool:
        one, other = (
            method(**brief, embedded_scales=scales).erase(load(name), BERRY, Run()).deltas
            for scales in ((1.0, 3.5), (1.0, 5.0))
        )
        return all(torch.equal(one[path], other[path]) for path in one)

    for method in (ESD, AllButOne):
        assert same("tiny-flux", method) and not same("tiny-flux-distilled", method)
