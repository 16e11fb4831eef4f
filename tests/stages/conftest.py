"""A toy suite for the toy model, and a real detector of colours and stripes."""

from pathlib import Path

import pytest
import torch

from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.core.measure import Detector
from expunge.core.records import OperatingPoint
from expunge.core.registry import find
from expunge.ops.stats import clopper_pearson
from expunge.stages.recipe import Recipe, parse

CHANNELS = {"red": 0, "green": 1, "blue": 2}
STYLES = {"striped": 1.0, "plain": -1.0}


class Colour(Detector):
    """Margin of one colour over the strongest other; styles by how much rows differ. Calibrated for colours only."""

    def score(self, images: torch.Tensor, concept: Concept) -> torch.Tensor:
        means = images.mean((2, 3))
        if concept.kind == "style":
            rows = images.mean((1, 3)).std(dim=1)
            return STYLES[concept.name] * (rows - 0.1)
        if concept.name not in CHANNELS:
            raise InputError(f"unknown concept {concept.name!r}; legal: {', '.join(CHANNELS)}")
        own = CHANNELS[concept.name]
        others = means[:, [channel for channel in range(3) if channel != own]]
        return means[:, own] - others.max(dim=1).values

    def operating_point(self, concept: Concept) -> OperatingPoint | None:
        if concept.kind == "style":
            return None
        return OperatingPoint(
            threshold=0.05, sensitivity=clopper_pearson(190, 200), specificity=clopper_pearson(196, 200), n=400
        )


@pytest.fixture
def colour(monkeypatch: pytest.MonkeyPatch) -> type[Colour]:
    """Put the detector into the catalogue under the name "colour"."""

    def found(package: str, name: str) -> type:
        return Colour if (package, name) == ("detectors", "colour") else find(package, name)

    monkeypatch.setattr("expunge.stages.score.find", found)
    return Colour


SUITE = """
name = "colours"
version = "1"
detectors = ["colour"]
[sampler]
steps = 3
guidance_scale = 3.0
[[target]]
name = "red"
kind = "object"
retain = ["green", "blue"]
[[target]]
name = "blue"
kind = "object"
retain = ["red"]
"""


def case_rows(target: str, retain: list[str], each: int = 4) -> list[str]:
    rows = []
    for index in range(each):
        prompt, seed = index // 2, index
        rows.append(f"{target}-t{index},{target},target,{target},,,a photo of {target} {prompt},{seed}")
        rows.append(f"{target}-s{index},{target},synonym,{target},,,a {target} dog {prompt},{seed}")
        rows += [
            f"{target}-{name}{index},{target},retain,{name},{('striped', 'plain')[index % 2]},,"
            f"a {name} car {prompt},{seed}"
            for name in retain
        ]
    return rows


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Write a suite of 28 cases: targets red and blue."""
    folder = tmp_path / "suites" / "colours"
    folder.mkdir(parents=True)
    (folder / "suite.toml").write_text(SUITE)
    head = "case_id,target,role,concept,style,background,prompt,seed"
    rows = [head, *case_rows("red", ["green", "blue"]), *case_rows("blue", ["red"])]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def recipe() -> Recipe:
    """One second of ESD on the toy model: red."""
    return parse(
        '[model]\nname = "tiny-unet"\n[method]\nname = "esd"\nsteps = 2\nbatch = 1\npool = 2\nwalk = 3\nlr = 1e-2\n'
        '[[target]]\nname = "red"\n[[retain]]\nname = "green"\n'
    )
