"""Lists are read from source without importing it, and must say what the imported classes say."""

import dataclasses
import inspect
import json

import pytest

from expunge.cli.facts import facts
from expunge.core.registry import catalogue, find


@pytest.mark.parametrize("name", catalogue("methods"))
def test_facts_agree_with_the_class(name: str) -> None:
    cls = find("methods", name)
    told = facts(name, catalogue("methods")[name])
    assert told.description == (inspect.getdoc(cls) or "").partition("\n")[0]
    assert told.attributes["paper"] == cls.paper
    assert told.attributes["families"] == sorted(cls.families)
    assert told.attributes.get("reconstruction", False) == cls.reconstruction
    assert [field.name for field in told.fields] == [field.name for field in dataclasses.fields(cls)]
    for mine, real in zip(told.fields, dataclasses.fields(cls), strict=True):
        assert eval(mine.default, {}) == real.default  # literals of our own source
        assert mine.help, f"{name}.{mine.name} has no docstring below it"


@pytest.mark.parametrize("name", catalogue("detectors"))
def test_detectors_describe_themselves(name: str) -> None:
    told = facts(name, catalogue("detectors")[name])
    assert told.description == (inspect.getdoc(find("detectors", name)) or "").partition("\n")[0]


@pytest.mark.parametrize("what", ["methods", "models", "suites", "detectors"])
def test_json_and_people_get_the_same_names(what: str, expunge) -> None:
    machine = expunge("list", what, "--json")
    names = [entry["name"] for entry in json.loads(machine.out)[what]]
    people = expunge("list", what)
    assert machine.code == people.code == 0
    for name in names:
        assert name in people.out


def test_a_reconstruction_is_called_one(expunge) -> None:
    (mine,) = [m for m in json.loads(expunge("list", "methods", "--json").out)["methods"] if m["name"] == "all_but_one"]
    assert mine["reconstruction"] is True
    assert "reconstruction" in expunge("list", "methods").out


def test_every_legal_name_is_listed(expunge) -> None:
    listed = json.loads(expunge("list", "methods", "--json").out)["methods"]
    assert [m["name"] for m in listed] == list(catalogue("methods"))
    toys = {m["name"] for m in json.loads(expunge("list", "models", "--json").out)["models"]}
    assert {"tiny-unet", "tiny-unet-v", "tiny-sdxl"} <= toys
