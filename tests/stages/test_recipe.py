"""Recipes: strict both ways, and `--set` against the method's own dataclass."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from expunge.core.errors import InputError
from expunge.stages.recipe import checked, parse, read, settings

TEXT = """
seed = 3
[model]
name = "tiny-unet"
[method]
name = "esd"
group = "cross_kv"
steps = 5
lr = 1
[[target]]
name = "strawberry"
prompts = ["strawberry", "a strawberry"]
anchor = {name = "banana"}
[[target]]
name = "dog"
kind = "identity"
[[retain]]
name = "car"
"""


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Every type a method's field has."""

    group: Literal["a", "b"] = "a"
    steps: int = 10
    lr: float = 1e-3
    clip: float | None = 1.0
    verbose: bool = False
    word: str = ""
    layers: tuple[str, ...] = ("x",)
    sizes: tuple[int, ...] = (1,)
    hidden: int = field(default=0, init=False)


def test_a_recipe_reads_as_request_and_eraser() -> None:
    recipe = parse(TEXT)
    request = recipe.request()
    assert list(request.pairs) == [("strawberry", "banana"), ("a strawberry", "banana"), ("dog", "")]
    assert (request.target[1].kind, request.retain[0].prompts) == ("identity", ("car",))
    eraser = recipe.eraser()
    assert (type(eraser).__name__, eraser.steps, eraser.group, eraser.lr) == ("ESD", 5, "cross_kv", 1.0)


def test_the_toml_round_trip_is_exact(tmp_path: Path) -> None:
    recipe = parse(TEXT)
    recipe.write(tmp_path / "recipe.toml")
    again = read(tmp_path / "recipe.toml")
    assert again == recipe


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seed = 3", "seeds = 3", "seeds: Unexpected keyword argument"),
        ("seed = 3", 'seed = "3"', "seed: Input should be a valid integer"),
        ('name = "tiny-unet"', "", "model.name is missing"),
        ('kind = "identity"', 'kind = "person"', "'person'"),
        ("steps = 5", "step = 5", "esd has no field 'step'; its fields are group="),
        ("steps = 5", "steps = 5.5", "esd: steps = 5.5 is not legal"),
        ('group = "cross_kv"', 'group = "k"', "group = 'k' is not legal"),
        ('name = "esd"', 'name = "usd"', "unknown method 'usd'; legal:"),
        # nothing is accepted that would have no effect
        ("[[retain]]", "[evaluate]\n[[retain]]", "evaluate: Unexpected keyword argument"),
        ('name = "tiny-unet"', 'name = "tiny-unet"\nrevision = "1"', "model.revision: Unexpected keyword argument"),
        ("[[retain]]", "[retain]", "retain: Input should be a valid array"),
        ("seed = 3", "seed = ", "is not valid TOML"),
        ('anchor = {name = "banana"}', 'anchor = {label = "banana"}', "anchor.label"),
    ],
)
def test_a_wrong_recipe_is_one_line(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(InputError) as caught:
        parse(TEXT.replace(old, new, 1), "recipe.toml")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_inconsistent_request_is_refused() -> None:
    with pytest.raises(InputError, match="anchor 'strawberry' is also a target"):
        parse(TEXT.replace("banana", "strawberry")).request()
    with pytest.raises(InputError, match="no such file"):
        read(Path("nowhere/recipe.toml"))


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["lr=1e-5"], {"lr": 1e-5}),
        (["lr=1"], {"lr": 1.0}),
        (["group=b", "verbose=true"], {"group": "b", "verbose": True}),
        (["word=true"], {"word": "true"}),
        (["word=7"], {"word": "7"}),
        (["word="], {"word": ""}),
        (["word=a=b"], {"word": "a=b"}),
        (["clip=none"], {"clip": None}),
        (["layers=p, q"], {"layers": ("p", "q")}),
        (['layers=["p"]'], {"layers": ("p",)}),
        (["sizes=[3, 4]"], {"sizes": (3, 4)}),
        ([" steps = 4 "], {"steps": 4}),
    ],
)
def test_set_words_become_typed_values(words: list[str], values: dict[str, Any]) -> None:
    found = settings(Knobs, words)
    assert found == values
    assert all(type(found[key]) is type(value) for key, value in values.items())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stps=4"], "has no field 'stps'; its fields are group='a', steps=10"),
        (["hidden=4"], "has no field 'hidden'"),
        (["steps=4.5"], "steps = 4.5 is not legal"),
        (["steps=four"], "steps = 'four' is not legal"),
        (["verbose=1"], "verbose = 1 is not legal"),
        (["group=c"], "group = 'c' is not legal (Input should be 'a' or 'b')"),
        (["steps"], "has no '='"),
        (["steps=1", "steps=2"], "names 'steps' twice"),
        (["lr=none"], "lr = 'none' is not legal"),
    ],
)
def test_wrong_set_words_name_the_legal_fields(words: list[str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(Knobs, words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_none_survives_toml_as_a_word() -> None:
    assert checked(Knobs, {"clip": "none"}) == {"clip": None}
    assert checked(Knobs, {"word": "none"}) == {"word": "none"}
