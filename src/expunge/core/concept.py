"""What is to be erased: concepts and the request that combines them. Free of torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from expunge.core.errors import InputError, unknown

Kind = Literal["object", "style", "identity", "explicit", "memorized", "abstract"]


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Something a generator can draw, named and phrased.

    Raises InputError for an empty name, no prompts, an empty prompt or an unknown kind.
    """

    name: str
    kind: Kind = "object"
    prompts: tuple[str, ...]
    """Phrases that evoke it; the first is the canonical one."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InputError("a concept needs a name, got an empty one")
        if self.kind not in get_args(Kind):
            raise unknown("concept kind", self.kind, get_args(Kind))
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise InputError(f"concept {self.name!r} needs at least one prompt and no empty ones, got {self.prompts!r}")

    @classmethod
    def of(cls, name: str) -> "Concept":
        """Make an object whose only prompt is its name."""
        return cls(name=name, kind="object", prompts=(name,))

    @property
    def phrase(self) -> str:
        """The canonical prompt."""
        return self.prompts[0]

    def same_as(self, other: "Concept") -> bool:
        """Tell whether two concepts share their name or their canonical prompt, ignoring case and outer spaces."""
        return _plain(self.name) == _plain(other.name) or _plain(self.phrase) == _plain(other.phrase)

    def shared_prompts(self, other: "Concept") -> list[str]:
        """List the prompts of this concept that the other has too, ignoring case and outer spaces."""
        theirs = {_plain(prompt) for prompt in other.prompts}
        return [prompt for prompt in self.prompts if _plain(prompt) in theirs]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which concepts to erase, where each is sent, and what must not move.

    `anchor[i]` is where `target[i]` is sent; None is the unconditional prediction. Raises InputError if there is no
    target, if the lengths differ, if a target or a retained concept is named twice, if an anchor is one of the targets,
    if a retained concept is one of them, or if a target shares a prompt with another one or a retained concept.
    """

    target: tuple[Concept, ...]
    anchor: tuple[Concept | None, ...]
    retain: tuple[Concept, ...] = ()

    def __post_init__(self) -> None:
        if not self.target:
            raise InputError("a request needs at least one target, got none")
        if len(self.anchor) != len(self.target):
            raise InputError(f"got {len(self.target)} targets but {len(self.anchor)} anchors; give one anchor each")
        for role, named in (("target", self.target), ("retained concept", self.retain)):
            for i, again in enumerate(named):
                if any(again.same_as(other) for other in named[:i]):
                    raise InputError(f"{role} {again.name!r} is named twice; name each once")
        for role, concepts in (("anchor", self.anchor), ("retained concept", self.retain)):
            for concept in concepts:
                if concept is not None and any(concept.same_as(target) for target in self.target):
                    raise InputError(f"{role} {concept.name!r} is also a target; choose a different {role}")
        self._check_prompts()

    def _check_prompts(self) -> None:
        for i, target in enumerate(self.target):
            for role, others in (("target", self.target[:i]), ("retained concept", self.retain)):
                for other in others:
                    if twice := target.shared_prompts(other):
                        raise InputError(
                            f"target {target.name!r} and {role} {other.name!r} share the prompt {twice[0]!r}; "
                            "give it to one of them"
                        )

    @classmethod
    def of(cls, target: str, *, anchor: str | None = None, retain: Sequence[str] = ()) -> "Request":
        """Make a request of one target from plain words."""
        return cls(
            target=(Concept.of(target),),
            anchor=(Concept.of(anchor) if anchor is not None else None,),
            retain=tuple(Concept.of(name) for name in retain),
        )

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every target prompt with the prompt it is sent to, "" where the anchor is None.

        Phrases pair up by position when target and anchor have equally many; otherwise each meets the canonical one.
        """
        for target, anchor in zip(self.target, self.anchor, strict=True):
            for index, prompt in enumerate(target.prompts):
                yield prompt, _facing(anchor, index, len(target.prompts))


def _facing(anchor: Concept | None, index: int, count: int) -> str:
    if anchor is None:
        return ""
    return anchor.prompts[index] if len(anchor.prompts) == count else anchor.phrase


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
