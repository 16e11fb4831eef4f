"""Suites: what a good one says, and that every way of being wrong is one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest

from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.suites.load import catalogue, load

TOML = """
name = "toys"
version = "1"
detectors = ["judge"]
[sampler]
steps = 4
guidance_scale = 5
[[target]]
name = "strawberry"
kind = "object"
prompts = ["strawberry", "a strawberry"]
synonyms = ["garden berry"]
anchor = "banana"
retain = ["car", "dog"]
[[target]]
name = "dog"
kind = "identity"
prompts = ["dog"]
retain = ["strawberry"]
"""
CASES = """case_id,target,role,concept,style,background,prompt,seed
s0,strawberry,target,strawberry,flat,red,a strawberry,0
s1,strawberry,synonym,strawberry,flat,red,"a garden berry, ripe",1
s2,strawberry,retain,dog,flat,red,a dog,2
d0,dog,target,dog,,,a dog,3
d1,dog,retain,strawberry,,,a strawberry,4
"""


def write(folder: Path, toml: str = TOML, cases: str = CASES) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "suite.toml").write_text(toml)
    (folder / "cases.csv").write_text(cases)
    return folder


def test_a_suite_owns_sampler_targets_and_cases(tmp_path: Path) -> None:
    suite = load(write(tmp_path / "toys"))
    assert (suite.name, suite.sampler.steps, suite.sampler.guidance_scale) == ("toys", 4, 5.0)
    assert [case.case_id for case in suite.cases_for("strawberry")] == ["s0", "s1", "s2"]
    assert suite.cases_for("strawberry")[1].prompt == "a garden berry, ripe"
    request = suite.target("strawberry").request()
    assert [(c.name, c.kind) for c in request.retain] == [("car", "object"), ("dog", "identity")]
    assert request.anchor[0] is not None and request.anchor[0].name == "banana"
    assert suite.target("dog").request().anchor == (None,)


def test_a_target_is_found_by_what_asks_for_it(tmp_path: Path) -> None:
    suite = load(write(tmp_path / "toys"))
    assert suite.target("a strawberry") is suite.target("strawberry")
    assert suite.cases_for("a strawberry") == suite.cases_for("strawberry")
    assert suite.named(Concept(name="a strawberry", kind="object", prompts=("a strawberry",))) == "strawberry"
    assert suite.named(Concept(name="berry", kind="object", prompts=("berry", "strawberry"))) == "strawberry"
    assert suite.named(Concept.of("cup")) == "cup"
    with pytest.raises(InputError, match=r"its targets are strawberry, dog$"):
        suite.target("cup")


def test_a_case_asks_for_the_target_or_for_the_neighbour_itself(tmp_path: Path) -> None:
    suite = load(write(tmp_path / "toys"))
    asked = {case.case_id: suite.concept_of(case) for case in suite.cases}
    assert asked["s1"].prompts == ("strawberry", "a strawberry")
    assert (asked["s2"].name, asked["s2"].kind) == ("dog", "identity")


def test_the_digest_sees_every_byte_of_both_files(tmp_path: Path) -> None:
    one = load(write(tmp_path / "a")).digest
    assert load(write(tmp_path / "b")).digest == one
    assert load(write(tmp_path / "c", cases=CASES.replace("a dog,3", "a dog,5"))).digest != one
    assert load(write(tmp_path / "d", toml=TOML + "# note\n")).digest != one


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("steps = 4", "steps = 0", "steps = 0 must be at least 1"),
        ("steps = 4", 'steps = "4"', "steps = '4' is not int"),
        ("steps = 4", "steps = 4\nsampler = 'pndm'", "unknown key 'sampler'; legal keys are guidance_scale, steps"),
        ('version = "1"', "", "'version' is missing"),
        ('kind = "object"', 'kind = "thing"', "kind = 'thing' is not one of object, style"),
        ('retain = ["car", "dog"]', 'retain = ["strawberry"]', "cannot be retained"),
        ('name = "dog"', 'name = "strawberry"', "two targets share a name"),
        ('anchor = "banana"', "anchors = []", "unknown key 'anchors'"),
        ('name = "toys"', 'name = "toys', "is not valid TOML"),
        ('synonyms = ["garden berry"]', 'synonyms = [""]', "not a list of non-empty texts"),
    ],
)
def test_a_wrong_header_is_one_line_with_the_place(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in TOML
    with pytest.raises(InputError, match=r"suite\.toml") as caught:
        load(write(tmp_path / "toys", toml=TOML.replace(old, new, 1)))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("s2,strawberry,retain,dog", "s2,strawberry,retain,cat", "line 4: concept 'cat' in role retain"),
        ("s0,strawberry,target", "s0,strawberry,main", "role 'main' is not one of target, synonym, retain"),
        ("s0,strawberry,target", "s0,berry,target", "target 'berry' is not in suite.toml"),
        ("a dog,3", "a dog,-3", "seed '-3'"),
        ("d1,dog", "s0,dog", "case_id 's0' stands twice"),
        ("a dog,3", "a dog", "expected 8 fields"),
        ("a dog,3", "a dog,3,4", "expected 8 fields"),
        ("case_id,target", "id,target", "expected case_id,target"),
        ("d1,dog,retain,strawberry,,,a strawberry,4\n", "", "'dog' has no retain rows"),
        ("red,a strawberry,0", "red, ,0", "must not be empty"),
    ],
)
def test_a_wrong_case_is_one_line_with_the_place(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in CASES
    with pytest.raises(InputError, match=r"cases\.csv") as caught:
        load(write(tmp_path / "toys", cases=CASES.replace(old, new, 1)))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_suites_and_targets_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown suite 'objekts'; known suites:"):
        load("objekts")
    with pytest.raises(InputError, match="no target 'cat'; its targets are strawberry, dog"):
        load(write(tmp_path / "toys")).cases_for("cat")


def test_every_suite_of_the_package_loads_and_lists_its_source() -> None:
    for name, folder in catalogue().items():
        suite = load(name)
        assert suite.name == name
        assert (folder / "SOURCE.md").is_file()


def test_loading_needs_no_torch() -> None:
    code = "import sys, expunge.suites.load as s; s.catalogue(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
