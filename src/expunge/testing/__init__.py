"""The contract every eraser keeps, as checks that anyone can run on their own class."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from expunge.core.eraser import Eraser
from expunge.testing.conduct import CONDUCT, TINY, Trial
from expunge.testing.shape import SHAPE, ContractError

__all__ = ["Check", "ContractError", "check_eraser", "eraser_checks"]


@dataclass(frozen=True)
class Check:
    """One part of the contract, ready to run."""

    name: str
    run: Callable[[], None]


def check_eraser(cls: type[Eraser], *, config: Mapping[str, Any] | None = None) -> None:
    """Hold a class to the whole contract; raises ContractError at the first part it does not keep.

    config: fields to try it with, beside the ones cut short for a toy.
    """
    for check in eraser_checks(cls, config=config):
        check.run()


def eraser_checks(cls: type[Eraser], *, config: Mapping[str, Any] | None = None) -> Iterator[Check]:
    """List the checks of a class one by one, for `pytest.mark.parametrize`.

    Those named in the class's `exempt` are left out. Checks on one toy model share its erasure.
    """
    for shape in SHAPE:
        if shape.__name__ not in cls.exempt:
            yield Check(shape.__name__, partial(shape, cls))
    for model in (model for family in sorted(cls.families) for model in TINY.get(family, ())):
        trial = Trial(cls, model, config or {})
        for conduct in CONDUCT:
            if conduct.__name__ not in cls.exempt:
                yield Check(f"{conduct.__name__}[{model}]", partial(conduct, trial))
