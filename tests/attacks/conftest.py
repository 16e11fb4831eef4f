"""A suite whose detectors compare with the unerased toy's own pictures, and an artifact that UCE made of the toy."""

from pathlib import Path

import pytest
import torch

from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import unknown
from expunge.core.measure import Detector
from expunge.core.records import OperatingPoint
from expunge.core.registry import find
from expunge.models.load import load
from expunge.stages.erase import erase
from expunge.stages.recipe import parse

PROMPTS = ("a photo of red", "a red car", "blue and red", "one red dog")
SUITE = """
name = "reds"
version = "1"
detectors = {detectors}
[sampler]
steps = 2
guidance_scale = 3.0
[[target]]
name = "red"
kind = "object"
retain = ["blue"]
"""


class Alike(Detector):
    """Fires on pictures that look like one of the unerased toy's own."""

    def __init__(self) -> None:
        drawn = load("tiny-unet").generate(PROMPTS, seeds=range(len(PROMPTS)), guidance_scale=3.0, steps=2)
        self.known = drawn

    def score(self, images: torch.Tensor, concept: Concept) -> torch.Tensor:
        apart = (images[:, None] - self.known[None]).abs().flatten(2).mean(2).min(1).values
        return 0.004 - apart

    def operating_point(self, concept: Concept) -> OperatingPoint | None:
        return None


class Choosy(Alike):
    """Knows one style by its suite's name and nothing else, as the image judges do."""

    def score(self, images: torch.Tensor, concept: Concept) -> torch.Tensor:
        if (concept.kind, concept.name) != ("style", "crimson"):
            raise unknown("style for this judge", concept.name, ["crimson"])
        return super().score(images, concept)


@pytest.fixture(autouse=True)
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the detectors into the catalogue, the first under two names."""

    ours = {"alike": Alike, "alike_too": Alike, "choosy": Choosy}

    def found(package: str, name: str) -> type:
        return ours[name] if package == "detectors" and name in ours else find(package, name)

    monkeypatch.setattr("expunge.stages.score.find", found)


def write_suite(folder: Path, detectors: str = '["alike", "alike_too"]') -> Path:
    folder.mkdir(parents=True)
    (folder / "suite.toml").write_text(SUITE.format(detectors=detectors))
    rows = ["case_id,target,role,concept,style,background,prompt,seed"]
    rows += [f"red-{index},red,target,red,,,{prompt},{index}" for index, prompt in enumerate(PROMPTS)]
    rows += ["red-again,red,target,red,,,a red car,9", "red-blue,red,retain,blue,,,a blue car,5"]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return write_suite(tmp_path / "suites" / "reds")


RECIPE = """
[model]
name = "tiny-unet"
[method]
name = "uce"
[[target]]
name = "red"
anchor = { name = "dog" }
"""


@pytest.fixture(scope="session")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; tests copy it before they write."""
    folder = tmp_path_factory.mktemp("erased") / "red"
    erase(parse(RECIPE), folder, Run(), recorded=False)
    return folder


@pytest.fixture
def run_folder(erased: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(erased, tmp_path / "red"))
