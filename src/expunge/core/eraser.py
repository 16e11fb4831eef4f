"""How concepts are erased: the base of all methods, and the run they happen in."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.core.patch import Patch


def _quiet_log(name: str, step: int, value: float) -> None:
    """Drop a logged value."""


def _quiet_progress(label: str, done: int, total: int) -> None:
    """Drop a progress report."""


@runtime_checkable
class Kept(Protocol):
    """A place where a training leaves what it needs to go on after it was killed."""

    every: int
    """Steps from one state to the next."""

    def load(self, name: str) -> Mapping[str, Tensor]:
        """Give what was saved last under a name; empty if nothing was."""
        ...

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace what is saved under a name, whole or not at all."""
        ...


@runtime_checkable
class Watch(Protocol):
    """Someone who looks at a model while it is trained, and may end the training; as text, what was seen last."""

    @property
    def every(self) -> int:
        """Steps from one look to the next."""
        ...

    @property
    def judges(self) -> bool:
        """Whether a look can end a training; otherwise nothing need be remembered for going back."""
        ...

    def __call__(self, done: int, view: Generator, *, last: bool) -> bool | None:
        """Look at the model as it is after `done` steps; None judges nothing, False ends at what was last True."""
        ...


@runtime_checkable
class Team(Protocol):
    """Processes that train the same model together; every one makes every step."""

    @property
    def rank(self) -> int:
        """Which of them this is, counted from 0."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their mean over all processes; all must call it alike."""
        ...


@dataclass(frozen=True)
class Run:
    """Where a computation happens: seed, device, log, progress, who watches, who shares the work, what a kill leaves.

    `log(name, step, value)` records a number, `progress(label, done, total)` reports work done; both quiet by default.
    A step of a training is the mean over `parts` = `accumulate` · processes losses, each drawn on its own.
    Raises InputError for accumulate below 1.
    """

    seed: int = 0
    device: str = "cpu"
    log: Callable[[str, int, float], None] = _quiet_log
    progress: Callable[[str, int, int], None] = _quiet_progress
    kept: Kept | None = None
    watch: Watch | None = None
    team: Team | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise InputError(f"accumulate is {self.accumulate}; legal: 1 and above")

    @property
    def parts(self) -> int:
        """Losses averaged in one step of a training, over all processes."""
        return self.accumulate * (self.team.size if self.team else 1)

    def draws(self, step: int) -> range:
        """Numbers of the losses of a step that are this process's to compute; no two losses share one."""
        rank, size = (self.team.rank, self.team.size) if self.team else (0, 1)
        return range(step * self.parts + rank, (step + 1) * self.parts, size)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their mean over all processes."""
        if self.team:
            self.team.average(tensors)

    def rng(self, *name: str | int) -> torch.Generator:
        """Give the random stream of a name.

        It depends on (seed, name) only, never on call order; it lives on the CPU so that devices agree.
        """
        digest = hashlib.sha256(repr((self.seed, *name)).encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def apart(self, *name: str | int) -> "Run":
        """Give a run whose streams are its own, for a part of the work that is done several times."""
        return replace(self, seed=int(torch.randint(2**31, (), generator=self.rng(*name))))


@dataclass(frozen=True, kw_only=True)
class Eraser(ABC):
    """A method: a frozen dataclass whose fields are its hyper-parameters, and one verb.

    Subclasses live in one file each under `methods/`; the file's stem is the method's name.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    paper: ClassVar[str]
    """"arXiv:<id>" or a DOI."""
    families: ClassVar[frozenset[Family]]
    claims: ClassVar[Mapping[str, bool]] = MappingProxyType(
        {"deterministic": True, "gradients": True, "inner_optimization": False}
    )
    """What standard attacks may assume about the erased model."""
    reconstruction: ClassVar[bool] = False
    """True where neither the paper's full text nor its code was available: our reading, never "the paper's number"."""
    uses_anchor: ClassVar[bool] = True
    """False where the method has no destination to send a target to, so a request's anchors do nothing."""
    uses_retain: ClassVar[bool] = True
    """False where the method has no term for retained concepts, so naming them does nothing."""
    brief: ClassVar[Mapping[str, int]] = MappingProxyType({"steps": 4, "walk": 2})
    """Settings that only repeat what has been done before, and the fewest repetitions that show what a run holds in
    memory: a rehearsal (`expunge plan`) goes no further. Names that a method has no field for say nothing."""
    composes: ClassVar[bool] = False
    """True where the change is one operator for all layers, stored as factors: others can follow it or be undone."""
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Contract checks that do not apply, by name, with the reason."""

    @property
    def retains(self) -> bool:
        """Whether retained concepts have any effect at these settings."""
        return self.uses_retain

    @abstractmethod
    def erase(self, model: Generator, request: Request, run: Run) -> Patch:
        """Compute the change that erases the request's targets; the model itself stays as it is."""

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Patch:
        """Rebuild a guard from its stored tensors and facts; methods that edit weights need none."""
        raise InputError(f"method {cls.__name__} leaves no guard, so there is nothing to restore")
