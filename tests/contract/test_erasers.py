"""Every method in the catalogue, on every toy family it claims, held to the whole contract."""

import dataclasses
from typing import Any

import pytest

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.registry import catalogue, find
from expunge.models.load import load
from expunge.testing import Check, eraser_checks

METHODS = sorted(catalogue("methods"))
SHORT: dict[str, dict[str, Any]] = {
    name: {"steps": 4, "walk": 2, "pool": 4, "batch": 1} for name in ("esd", "all_but_one", "erase_anything", "ce_sdwv")
} | {
    "mace": {"steps": 4, "walk": 2, "pictures": 2, "batch": 1},
    "sepme": {"steps": 4, "walk": 2, "pictures": 2, "tolerance": 0.1},
}
GAME = {"steps": 4, "walk": 3, "pool": 4, "pairs": 4, "refresh": 2, "pictures": 2, "draws": 2, "batch": 2}
SHORT |= {"score": GAME, "fade": GAME, "ant": {"steps": 4, "walk": 3, "pool": 4, "maps": 1, "batch": 2}}
# A toy is so narrow that a window or two of rows fill its width: what is held has to be held less exactly.
NARROW: dict[str, dict[str, Any]] = {"sepme": {"tolerance": 0.1, "pictures": 2}}
# A game walks its own paths again and again: minutes for what a few steps show as well.
NARROW |= {name: {**SHORT[name], "steps": 20} for name in ("score", "fade", "ant")}
CASES = [
    pytest.param(check, id=f"{name}-{check.name}")
    for name in METHODS
    for check in eraser_checks(find("methods", name), config=NARROW.get(name))
]
# What a method does by other settings than its defaults; one toy suffices, the families were tried above.
VARIANTS = {
    "esd-x": ("esd", {"group": "cross_attention"}),
    "esd-all": ("esd", {"group": "all"}),
    "uce2025": ("uce", {"mode": "uce2025"}),
    "uce-tensor": ("uce", {"technique": "tensor"}),
    "rece-window-anchor": ("rece", {"rows": "window", "pull": "anchor"}),
    "trce-code": ("trce", {"closing": "words", "preservation": "twice"}),
    "trce-rows": ("trce", {"word_weight": 1.0, "padding_weight": 1.0, "opening_weight": 1.0}),
    "ant-multi": ("ant", {"mode": "multi", "lr": 1e-3}),
    "score-flipped-free": ("score", {"form": "flipped", "share": 1.0, "group": "cross_attention"}),
    "sepme-joint-code": ("sepme", {"order": "joint", "gradients": "accumulated"}),
    "project-words": ("project", {"held": "words", "rows": "word", "templates": ("{}",)}),
    "project-room": ("project", {"toward": "room"}),
    "all_but_one-projection": ("all_but_one", {"constraint": "projection", "group": "cross_attention"}),
    "all_but_one-penalty": ("all_but_one", {"constraint": "penalty"}),
}
# On an untrained toy: uce2025 guards one row of a retained prompt and leaves its padding free to move, project-words
# all but its padding; TRCE's program takes rows that no default holds; four steps of All but One hold nothing yet.
FREE = {"uce2025", "trce-code", "trce-rows", "all_but_one-penalty", "project-words"}
VARIED = [
    pytest.param(check, id=f"{variant}-{check.name}")
    for variant, (name, config) in VARIANTS.items()
    for check in eraser_checks(find("methods", name), config={**config, **SHORT.get(name, {})})
    if check.name.endswith("[tiny-unet]")
    and not (variant in FREE and check.name.startswith("moves_the_target_more_than_what_is_retained"))
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check: Check) -> None:
    check.run()


@pytest.mark.parametrize("check", VARIED)
def test_contract_of_variants(check: Check) -> None:
    check.run()


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_it_ignores_changes_nothing(name: str) -> None:
    """And what it says it heeds changes something: pages and notes repeat these claims."""
    cls, brief = find("methods", name), SHORT.get(name, {})
    model = load("tiny-unet" if "unet" in cls.families else "tiny-flux")

    def tensors(config: dict[str, Any], **words: Any) -> dict[str, Any]:
        return cls(**brief, **config).erase(model, Request.of("red cat", **words), Run()).tensors()

    def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
        return one.keys() == two.keys() and all(bool((one[key] == two[key]).all()) for key in one)

    weights: list[dict[str, Any]] = [{}]
    if "retain_weight" in {field.name for field in dataclasses.fields(cls)}:
        weights += [{"retain_weight": 0.0}, {"retain_weight": 1.0}]
    for config in weights:
        plain = tensors(config)
        assert same(plain, tensors(config, retain=("guitar",))) != cls(**brief, **config).retains
    assert same(plain, tensors(config, anchor="dog")) != cls.uses_anchor


@pytest.mark.parametrize("name", METHODS)
def test_exemptions_name_checks_and_give_reasons(name: str) -> None:
    cls = find("methods", name)
    assert issubclass(cls, Eraser)
    known = {check.name.partition("[")[0] for check in eraser_checks(cls)} | set(cls.exempt)
    held = type("Held", (cls,), {"exempt": {}})
    assert known == {check.name.partition("[")[0] for check in eraser_checks(held)}
    assert all(reason.strip().endswith(".") for reason in cls.exempt.values())
