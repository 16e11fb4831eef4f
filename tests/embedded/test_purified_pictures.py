"""A real picture of emoji world, not drawn by any model, loses what was erased; the base model's walk keeps it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import world

from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.registry import find
from expunge.stages.erase import erase
from expunge.stages.purify import purify
from expunge.stages.recipe import parse
from expunge.stages.sample import png

UCE = "[model]\nname = 'emoji-unet'\n[method]\nname = 'uce'\n"
BERRY = "[[target]]\nname = 'strawberry'\nanchor = {name = 'apple'}\n[[retain]]\nname = 'cherries'\n"
ALL_BUT_ONE = "[model]\nname = 'emoji-unet'\n[method]\nname = 'all_but_one'\nsteps = 100\npool = 48\nwalk = 25\n"
WALK = {"guidance_scale": 4.0, "steps": 30, "depth": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uce")
    erase(parse(UCE + BERRY), out, Run())
    return out


def real(name: str, folder: Path) -> Path:
    """The first flat render of a concept on blue."""
    data = world.load()
    chosen = (data.concept == data.concepts.index(name)) & (data.style == data.styles.index("flat"))
    index = chosen.nonzero()[:1, 0]
    image = data.compose(index, torch.full((1,), list(world.BACKGROUNDS).index("blue")))[0]
    file = folder / f"{name}.png"
    file.write_bytes(png(image))
    return file


def shows(file: Path, name: str) -> bool:
    pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255)
    return bool(find("detectors", "judge_cnn")().fires(pixels.permute(2, 0, 1)[None], Concept.of(name)))


def test_the_erased_concept_leaves_the_picture_and_stays_in_the_base_models_walk(made: Path, tmp_path: Path) -> None:
    picture = real("strawberry", tmp_path)
    assert shows(picture, "strawberry")
    before, after = purify(
        made, picture, "a flat picture of a strawberry on a blue background", tmp_path / "out", Run(), **WALK
    )
    assert shows(before, "strawberry")
    assert not shows(after, "strawberry")


@pytest.mark.slow
def test_a_neighbour_stays(made: Path, tmp_path: Path) -> None:
    picture = real("cherries", tmp_path)
    _, after = purify(
        made, picture, "a flat picture of a cherries on a blue background", tmp_path / "out", Run(), **WALK
    )
    assert shows(after, "cherries")


@pytest.mark.slow
def test_a_trained_erasure_purifies_as_well_and_its_neighbour_stays(tmp_path: Path) -> None:
    erase(parse(ALL_BUT_ONE + BERRY), tmp_path / "made", Run())
    found = {}
    for name in ("strawberry", "cherries"):
        prompt, out = f"a flat picture of a {name} on a blue background", tmp_path / name
        found[name] = purify(tmp_path / "made", real(name, tmp_path), prompt, out, Run(), **WALK)
    assert all(shows(before, name) for name, (before, _) in found.items())
    assert not shows(found["strawberry"][1], "strawberry")
    assert shows(found["cherries"][1], "cherries")


def test_what_is_no_picture_is_refused_in_a_line(made: Path, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(InputError, match=r"words\.png is not a picture"):
        purify(made, tmp_path / "words.png", "a strawberry", tmp_path / "out", Run(), **WALK)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="depth is 2"):
        purify(made, real("cherries", tmp_path), "cherries", tmp_path / "out", Run(), **{**WALK, "depth": 2.0})
    assert not (tmp_path / "out").exists()
