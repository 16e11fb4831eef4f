"""FLUX hears a prompt by two routes: an edit that closes one and leaves the other open is seen failing."""

import pytest
import torch

from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.registry import find
from expunge.models.load import load
from expunge.patches.weights import WeightPatch
from expunge.suites.load import load as load_suite

GROUNDS = ("pink", "yellow", "green", "blue", "gray", "purple")
TEMPLATES = ("{}", "a picture of a {}", "a {} on a plain background", "a flat picture of a {}")


@pytest.fixture(scope="module", params=["emoji-flux", "emoji-flux-distilled"])
def base(request: pytest.FixtureRequest) -> Generator:
    return load(request.param)


def drawn(model: Generator) -> int:
    """Of six pictures asked to be a violin, how many are."""
    prompts = [f"a flat picture of a violin on a {ground} background" for ground in GROUNDS]
    with torch.no_grad():
        images = model.generate(prompts, seeds=range(len(prompts)), guidance_scale=4.0, steps=15)
    judge = find("detectors", "judge_cnn")()
    return int(judge.fires(images, Concept.of("violin")).sum())


def test_a_pooled_route_left_open_still_draws_the_target(base: Generator) -> None:
    aim = load_suite("objects").target("violin")
    uce = find("methods", "uce")(ridge=10.0, templates=TEMPLATES)
    erased = uce.erase(base, aim.request(), Run()).on(base)
    only = {
        route: WeightPatch(
            {site.path: erased.weight(site.path) - site.weight for site in base.sites("text_in") if site.reads == route}
        ).on(base)
        for route in ("tokens", "pooled")
    }
    assert drawn(base) >= 5
    assert drawn(erased) <= 1
    assert drawn(only["tokens"]) >= 5  # T5's rows are edited, CLIP's sentence is not
    assert drawn(only["pooled"]) <= 2  # in these models the sentence says most of what is drawn
