"""The artifact's card: everything needed to know what a patch is and where it came from. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expunge.core.codec import from_json, to_json
from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.core.records import Certificate

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model a patch belongs to."""

    name: str
    revision: str
    family: str
    licence: str
    sha256: str
    """Over family, kind of prediction and the touched base tensors; for guards the text encoder instead of these; for
    shared operators that come from the text alone, over family and text encoder."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the patch file holds."""

    kind: str
    meta: Mapping[str, Any]
    sha256: str
    """Of the file patch.safetensors."""
    tensors: int
    bytes: int
    share: float
    """Changed parameters over all parameters of the network, 0 to 1."""
    layers: Mapping[str, float] = field(default_factory=dict)
    """Relative change ||W' - W|| / ||W|| per changed tensor, by path; empty for guards."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How the patch was made.

    The code is named by `package_sha256`, and by its commit where it came out of git: a wheel or a zip has none.
    Only a run started without provenance (`recorded` False) may leave both out; otherwise InputError.
    """

    seed: int
    device: str
    dtype: str
    seconds: float
    peak_bytes: int
    packages: Mapping[str, str]
    source_sha256: str
    """Of the method's source file."""
    package_sha256: str | None
    """Of all source files of this library, by name and content."""
    commit: str | None
    dirty: bool | None
    recorded: bool = True
    parts: int | None = None
    """Losses averaged in each step of the training, accumulated or one per process; None: one."""
    budget: float | None = None
    """Most that what should stay might move, see expunge.ops.collateral; None: nobody asked."""

    def __post_init__(self) -> None:
        if self.recorded and not (self.package_sha256 and self.packages):
            raise InputError(
                "provenance lacks the hash of the sources or package versions; pass --no-provenance to go on"
            )
        if (self.commit is None) != (self.dirty is None):
            raise InputError(f"commit {self.commit!r} and dirty flag {self.dirty!r} belong together; give both or none")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The JSON beside a patch.

    `config` is every field in force, `given` those the user set. Raises InputError for another schema version.
    """

    schema: int = SCHEMA
    method: str
    paper: str
    description: str
    """First line of the method's docstring."""
    config: Mapping[str, Any]
    given: tuple[str, ...]
    target: tuple[Concept, ...]
    anchor: tuple[Concept | None, ...]
    retain: tuple[Concept, ...]
    base: Base
    patch: Contents
    run: Provenance
    claims: Mapping[str, bool]
    """What standard attacks can judge: deterministic, gradients usable, no inner optimization."""
    certificates: tuple[Certificate, ...] | None = None
    """What holds of the edit as it is stored, without a picture; empty for guards, which change no weight. None: the
    card is older than they are."""

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise InputError(f"card has schema {self.schema}; this version reads {SCHEMA}")

    def to_json(self) -> str:
        """Write with sorted keys and one trailing newline."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Read what `to_json` wrote; anything missing, unknown or mistyped raises InputError."""
        return from_json(cls, text)
