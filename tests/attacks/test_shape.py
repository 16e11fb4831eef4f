"""What every attack's file and class look like, and that floors hold for it."""

import ast

import pytest

from expunge.core.attack import Attack
from expunge.core.registry import catalogue, find
from expunge.testing.shape import has_a_strict_config_with_a_schema, is_a_frozen_dataclass_with_defaults

NAMES = sorted(catalogue("attacks"))


def test_the_five_are_there() -> None:
    assert NAMES == ["kv_inversion", "negative_flip", "random_suffix", "relearning", "soft_token"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_frozen_attack_with_a_strict_configuration(name: str) -> None:
    cls = find("attacks", name)
    assert issubclass(cls, Attack)
    is_a_frozen_dataclass_with_defaults(cls)  # type: ignore[arg-type]
    has_a_strict_config_with_a_schema(cls)  # type: ignore[arg-type]
    assert cls.families <= {"unet", "mmdit"} and cls.families


@pytest.mark.parametrize("name", NAMES)
def test_it_knows_no_model_no_method_and_no_other_attack(name: str) -> None:
    for node in ast.walk(ast.parse(catalogue("attacks")[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("expunge."):
            assert (node.module or "").split(".")[1] in ("core", "ops", "patches"), node.module
