"""What the benchmark of text routes lets a network hear, and what it counts."""

import pytest
import torch
from benchmarks import routes

from expunge.core.generator import Generator
from expunge.models.load import load

SAID = ["a picture of a cat", "a picture of a dog"]


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-flux-distilled", "tiny-sd3"])
def model(request: pytest.FixtureRequest) -> Generator:
    return load(request.param)


def test_one_route_asks_and_the_other_is_silent(model: Generator) -> None:
    asked, silent = model.encode(SAID), model.encode(["", ""])
    (tokens,), (pooled,) = (routes.heard(model, route, SAID).guards for route in ("tokens", "pooled"))
    rows, vector = tokens.condition(asked), pooled.condition(asked)
    assert torch.equal(rows.tokens, asked.tokens) and torch.equal(rows.pooled, silent.pooled)
    assert torch.equal(vector.tokens, silent.tokens) and torch.equal(vector.pooled, asked.pooled)
    assert torch.equal(rows.mask, asked.mask) and torch.equal(vector.mask, silent.mask)
    assert routes.heard(model, "both", SAID) is model


def test_either_route_changes_the_picture(model: Generator) -> None:
    def drawn(route: str, prompts: list[str]) -> torch.Tensor:
        view = routes.heard(model, route, prompts)
        return view.generate(prompts, seeds=(1, 2), guidance_scale=2.0, steps=2)

    pictures = [drawn(route, SAID) for route in routes.ROUTES]
    assert all(not torch.allclose(pictures[i], pictures[j], atol=1e-4) for i, j in ((0, 1), (0, 2), (1, 2)))
    nothing = [drawn(route, ["", ""]) for route in routes.ROUTES]
    assert all(torch.allclose(nothing[0], other, atol=1e-4) for other in nothing[1:])


def test_rates_are_counted_by_route_with_exact_intervals() -> None:
    found = [
        routes.Seen("esd", target, route, {judge: hits for judge in routes.JUDGES})
        for target in ("cat", "dog")
        for route, hits in (("tokens", [True, False]), ("pooled", [False, False]))
    ]
    rates = routes.table(found)["judge_cnn"]["esd"]
    assert (rates["tokens"].value, rates["tokens"].n, rates["pooled"].value) == (0.5, 4, 0.0)
    assert rates["pooled"].high == pytest.approx(1 - 0.025 ** (1 / 4)) and rates["pooled"].how == "clopper-pearson"
