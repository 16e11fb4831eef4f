"""Prompts that ask for a concept, each with a twin that differs only in asking for the anchor. Free of torch.

Splits are by sentence frame, so that no frame, and no twin, is met twice. Source: certificates.md, sections 0 and 9.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.core.errors import InputError

Level = Literal["quick", "standard", "audit"]
PAIRS: dict[Level, int] = {"quick": 250, "standard": 1000, "audit": 5000}
"""Twin pairs per level; clean leaks of about 5, 2 and 0.4 % are then found by a detector."""
SHARES = (0.5, 0.2, 0.3)
"""Train, calibrate, test."""
SUBJECTS = (
    "a {s} picture of a {{}}",
    "{s} picture of a {{}}",
    "a {s} {{}}",
    "{s} {{}}",
    "a {{}} in {s} style",
    "{{}} in {s} style",
    "a picture of a {{}} in {s} style",
    "picture of a {{}} in {s} style",
    "a {s} style {{}}",
    "a {s} style picture of a {{}}",
)
ENDS = (
    " on a {b} background",
    ", {b} background",
    " on {b}",
    " on {b} background",
    ", {b}",
    ", on a {b} background",
)
"""Words of plain captions only: of icons and prints the embedded model knows nothing, and draws accordingly."""


@dataclass(frozen=True)
class Twin:
    """One sentence about the concept and the same about the anchor; `pair` is its place in the draw."""

    pair: int
    concept: str
    anchor: str


@dataclass(frozen=True)
class Split:
    """Places of twin pairs to train on, to calibrate on, and to test on once; disjoint."""

    train: tuple[int, ...]
    calibrate: tuple[int, ...]
    test: tuple[int, ...]

    @classmethod
    def of(cls, pairs: int, seed: int) -> "Split":
        """Split at random, 50 / 20 / 30."""
        order = list(range(pairs))
        random.Random(f"split {seed}").shuffle(order)
        one, two = int(SHARES[0] * pairs), int((SHARES[0] + SHARES[1]) * pairs)
        return cls(tuple(sorted(order[:one])), tuple(sorted(order[one:two])), tuple(sorted(order[two:])))


def frames(styles: Sequence[str], backgrounds: Sequence[str]) -> tuple[str, ...]:
    """Give sentences with one {} for what is shown: every subject and ending with every style and background."""
    return tuple(
        subject.format(s=style) + end.format(b=background)
        for subject in SUBJECTS
        for end in ENDS
        for style in styles
        for background in backgrounds
    )


def check_frames(lines: Sequence[str]) -> tuple[str, ...]:
    """Return a user's sentences, each once; raises InputError for one without exactly one {}."""
    found = tuple(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    wrong = next((line for line in found if line.count("{}") != 1), None)
    if wrong is not None:
        raise InputError(f"prompt {wrong!r}; legal: one {{}} where the concept goes, as in 'a photo of a {{}}'")
    return found


def twins(lines: Sequence[str], phrases: Sequence[str], anchor: str, level: Level, seed: int) -> tuple[Twin, ...]:
    """Draw as many frames as the level asks, without replacement, each with one phrase of the concept.

    The law of prompts is: a frame uniformly, then a phrase uniformly. Raises InputError if there are too few frames,
    or if the anchor is one of the phrases.
    """
    wanted = PAIRS[level]
    if len(set(lines)) < wanted:
        raise InputError(
            f"{len(set(lines))} prompts are too few for level {level!r}, which needs {wanted}; "
            f"legal: a lower level, or --prompts with more sentences"
        )
    if anchor.casefold() in {phrase.casefold() for phrase in phrases}:
        raise InputError(f"anchor {anchor!r} is a phrase of the concept itself; choose another with --anchor")
    dice = random.Random(f"twins {seed}")
    chosen = dice.sample(sorted(set(lines)), wanted)
    return tuple(
        Twin(index, line.replace("{}", dice.choice(phrases)), line.replace("{}", anchor))
        for index, line in enumerate(chosen)
    )


def digest(pairs: Sequence[Twin]) -> str:
    """Hash the prompts of both arms in order: what "these prompts" means."""
    text = "\n".join(f"{twin.concept}\t{twin.anchor}" for twin in pairs)
    return hashlib.sha256(text.encode()).hexdigest()


def draw_seed(seed: int, arm: str, pair: int) -> int:
    """Give the seed of one picture: independent of C, and of every other picture's."""
    return int.from_bytes(hashlib.sha256(f"{seed} {arm} {pair}".encode()).digest()[:4], "big") >> 1
