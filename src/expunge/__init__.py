"""Concept erasure for image generators: interchangeable erasers, models and measurements.

Names are imported on first use, so that `import expunge` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expunge.core.attack import Aim, Attack, Attempt
    from expunge.core.card import Card
    from expunge.core.concept import Concept, Request
    from expunge.core.condition import Condition
    from expunge.core.eraser import Eraser, Run
    from expunge.core.errors import InputError
    from expunge.core.generator import EditSite, Generator, Guard, State
    from expunge.core.measure import Detector, Metric, Samples
    from expunge.core.patch import Patch
    from expunge.core.records import Estimate
    from expunge.core.registry import catalogue, find
    from expunge.models.load import load
    from expunge.patches.guard import GuardPatch
    from expunge.patches.lowrank import LowRankPatch
    from expunge.patches.weights import WeightPatch
    from expunge.stages.erase import check

__version__ = "0.1.0"

_HOMES = {
    "expunge.core.attack": ("Aim", "Attack", "Attempt"),
    "expunge.core.card": ("Card",),
    "expunge.core.concept": ("Concept", "Request"),
    "expunge.core.condition": ("Condition",),
    "expunge.core.errors": ("InputError",),
    "expunge.core.eraser": ("Eraser", "Run"),
    "expunge.core.generator": ("EditSite", "Generator", "Guard", "State"),
    "expunge.core.measure": ("Detector", "Metric", "Samples"),
    "expunge.core.patch": ("Patch",),
    "expunge.core.records": ("Estimate",),
    "expunge.core.registry": ("catalogue", "find"),
    "expunge.models.load": ("load",),
    "expunge.patches.guard": ("GuardPatch",),
    "expunge.patches.lowrank": ("LowRankPatch",),
    "expunge.patches.weights": ("WeightPatch",),
    "expunge.stages.erase": ("check",),
}

__all__ = [
    "Aim",
    "Attack",
    "Attempt",
    "Card",
    "Concept",
    "Condition",
    "Detector",
    "EditSite",
    "Eraser",
    "Estimate",
    "Generator",
    "Guard",
    "GuardPatch",
    "InputError",
    "LowRankPatch",
    "Metric",
    "Patch",
    "Request",
    "Run",
    "Samples",
    "State",
    "WeightPatch",
    "catalogue",
    "check",
    "find",
    "load",
]


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
