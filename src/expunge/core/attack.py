"""How erased concepts are brought back: the base of all attacks, what they go for and what they hand to the sampler."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.core.harm import refuse_harm

Access = Literal["prompt", "embedding", "image", "weights"]
Threat = Literal["T0", "T1", "T2", "T3", "T4", "T5", "T6", "T7"]
"""T0 ordinary prompts; T1 the public text encoder; T2 many queries; T3 gradients, discrete tokens; T4 gradients,
arbitrary embeddings; T5 the latent side; T6 the weights; T7 before the erasure."""
Rule = Literal["last", "any"]
"""Which of several attempts counts: the last one, or any (the one a selecting detector picks)."""
Source = Literal["drawn", "world"]
"""Whose pictures an attack learns from: the unerased model's own, or real ones of emoji world."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures an attacker asks for."""

    source: Source
    count: int


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is to be brought back: a concept, the prompts to win, and pictures of it that the attacker owns.

    Every prompt and caption holds one of the concept's phrases. Raises InputError where one does not, for lengths that
    disagree, and for texts no attack is run on.
    """

    concept: Concept
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: Float[Tensor, "n 3 h w"] | None = None
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_harm(self.concept, self.prompts)
        if not self.prompts or len(self.seeds) != len(self.prompts):
            raise InputError(f"an aim needs one seed per prompt, got {len(self.prompts)} and {len(self.seeds)}")
        if len(self.captions) != (0 if self.images is None else len(self.images)):
            raise InputError(f"an aim needs one caption per picture, got {len(self.captions)}")
        for text in (*self.prompts, *self.captions):
            self.renamed(text, "")

    def renamed(self, text: str, word: str) -> str:
        """Put a word in place of the concept's phrase; raises InputError for a text without it."""
        for phrase in sorted(self.concept.prompts, key=len, reverse=True):
            at = f" {text.casefold()} ".find(f" {phrase.casefold()} ")
            if at >= 0:
                return " ".join((text[:at] + word + text[at + len(phrase) :]).split())
        raise InputError(
            f"prompt {text!r} does not name {self.concept.name!r}; legal: {', '.join(self.concept.prompts)}"
        )


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What an attack hands to the sampler: a model as attacked, and one prompt and seed for each of the aim's."""

    model: Generator
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: tuple[str, ...] | None = None
    step: int = 0
    """What was spent to get here: optimizer steps, or tries."""
    gradients: int = 0
    """Gradient evaluations so far, one per sample and step."""
    learned: int = 0
    """Numbers that were fitted."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """What the attack measured about itself."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack: a frozen dataclass whose fields are its budget, and one verb.

    Subclasses live in one file each under `attacks/`; the file's stem is the attack's name. It sees the model as the
    user ships it, and never the eraser. Success is a lower bound on what is left, never more.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    paper: ClassVar[str]
    """"arXiv:<id>", a DOI, or "ours"."""
    access: ClassVar[Access]
    threat: ClassVar[Threat]
    families: ClassVar[frozenset[Family]]
    rule: ClassVar[Rule] = "last"
    knows_original: ClassVar[bool] = False
    """Whether it needs the unerased model."""
    knows_defence: ClassVar[bool] = False
    """Whether it is made for one kind of erasure."""
    meets_guards: ClassVar[bool] = True
    """False where it works on predictions, which guards never touch: against a guard it is then not adaptive."""

    def pictures(self) -> Pictures | None:
        """Say which pictures of the concept it learns from; None where it needs none."""
        return None

    @abstractmethod
    def search(self, model: Generator, aim: Aim, run: Run, *, reference: Generator) -> Iterator[Attempt]:
        """Give attempts, cheapest first. `reference` is the unerased model; raises InputError where nothing applies."""

    @abstractmethod
    def random(
        self, model: Generator, aim: Aim, run: Run, *, reference: Generator, found: Attempt
    ) -> Iterator[Attempt]:
        """Give what luck finds with the budget of the search; `found` is the last attempt of that."""
