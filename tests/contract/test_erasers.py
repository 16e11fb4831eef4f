"""Every method in the catalogue, on every toy family it claims, held to the whole contract."""

import pytest

from expunge.core.eraser import Eraser
from expunge.core.registry import catalogue, find
from expunge.testing import Check, eraser_checks

METHODS = sorted(catalogue("methods"))
CASES = [
    pytest.param(check, id=f"{name}-{check.name}") for name in METHODS for check in eraser_checks(find("methods", name))
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check: Check) -> None:
    check.run()


@pytest.mark.parametrize("name", METHODS)
def test_exemptions_name_checks_and_give_reasons(name: str) -> None:
    cls = find("methods", name)
    assert issubclass(cls, Eraser)
    known = {check.name.partition("[")[0] for check in eraser_checks(cls)} | set(cls.exempt)
    held = type("Held", (cls,), {"exempt": {}})
    assert known == {check.name.partition("[")[0] for check in eraser_checks(held)}
    assert all(reason.strip().endswith(".") for reason in cls.exempt.values())
