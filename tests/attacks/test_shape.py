"""What every attack's file and class look like, and that floors hold for it."""

import ast
from dataclasses import fields

import pytest
from pydantic import TypeAdapter, ValidationError

from expunge.core.attack import Attack
from expunge.core.registry import catalogue, find

NAMES = sorted(catalogue("attacks"))


def test_the_five_are_there() -> None:
    assert NAMES == ["kv_inversion", "negative_flip", "random_suffix", "relearning", "soft_token"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_frozen_attack_with_a_strict_configuration(name: str) -> None:
    cls = find("attacks", name)
    assert issubclass(cls, Attack)
    assert cls.__dataclass_params__.frozen and all(field.kw_only for field in fields(cls))  # type: ignore[attr-defined]
    adapter = TypeAdapter(cls)
    assert adapter.validate_json(adapter.dump_json(cls())) == cls()
    with pytest.raises(ValidationError, match="no_such_field"):
        adapter.validate_python({"no_such_field": 1})
    assert cls.families <= {"unet", "mmdit"} and cls.families


@pytest.mark.parametrize("name", NAMES)
def test_it_knows_no_model_no_method_and_no_other_attack(name: str) -> None:
    for node in ast.walk(ast.parse(catalogue("attacks")[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("expunge."):
            assert (node.module or "").split(".")[1] in ("core", "ops", "patches"), node.module
