"""A run folder as one value: summaries, cards, pictures and verdicts, read and never written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.core.card import Card
from expunge.core.codec import from_data
from expunge.core.errors import InputError
from expunge.core.outcome import Outcome
from expunge.core.records import Case, Summary
from expunge.leakage.record import LeakageCertificate
from expunge.stages import _card, _files, _leakage, _outcomes

BASE = "base"
CASE_KEYS = ("case_id", "target", "role", "concept", "style", "background", "prompt", "seed")


@dataclass(frozen=True)
class Suite:
    """What one suite left in a run: its rates, and its pictures by arm and case."""

    summary: Summary
    cases: Mapping[str, Case]
    pictures: Mapping[tuple[str, str], Path]
    """By (arm, case_id)."""
    seen: Mapping[tuple[str, str], bool]
    """Whether the first detector recognised the case's own concept, by (arm, case_id)."""
    steps: int
    guidance_scale: float

    @property
    def arms(self) -> list[str]:
        """Names of the arms, base first."""
        return list(dict.fromkeys(arm.name for arm in self.summary.arms))

    @property
    def detectors(self) -> list[str]:
        """Names of the detectors, in the suite's order; the first one speaks in the pictures and sentences."""
        return list(dict.fromkeys(arm.detector for arm in self.summary.arms))


@dataclass(frozen=True)
class Findings:
    """All of a run that a page shows."""

    folder: Path
    model: str
    suites: tuple[Suite, ...]
    cards: Mapping[str, Card]
    """By arm."""
    leakage: Sequence[LeakageCertificate]
    """In the order of arms and concepts."""
    attacks: Mapping[str, Sequence[Outcome]]
    """By arm; empty where none was tried."""


def read(folder: Path) -> Findings:
    """Read a run folder that holds one artifact, or several in subfolders.

    Raises InputError if nothing was summarized there or a file is torn.
    """
    table = _object(folder / "summary.json", "score the run first: expunge score DIR --suite SUITE")
    cards = _cards(folder)
    leakage = [each for place, card in cards.values() for each in _leakages(place.parent.parent, card)]
    suites = tuple(_suite(folder, from_data(Summary, entry)) for entry in table["suites"])
    if not suites:
        raise InputError(f"{folder / 'summary.json'} holds no suite; score the run again")
    model = _header(folder, suites[0].summary.suite, BASE)["identity"]["model"]
    attacks = {arm: _attacks(place.parent.parent, card) for arm, (place, card) in cards.items()}
    bare = {arm: card for arm, (_, card) in cards.items()}
    return Findings(folder, model, suites, bare, leakage, attacks)


def _leakages(run: Path, card: Card) -> list[LeakageCertificate]:
    found = _leakage.read(run)
    if stale := [each for each in found if each.scope.patch_hash != card.patch.sha256]:
        raise InputError(
            f"{run} holds a leakage certificate of another patch, on {stale[0].scope.concept!r}: remove it"
        )
    return found


def _attacks(run: Path, card: Card) -> list[Outcome]:
    found = _outcomes.read(run)
    for outcome in found:
        if outcome.patch_sha256 != card.patch.sha256:
            raise InputError(f"{run} holds a result of attack {outcome.attack!r} on another artifact; move it away")
    return found


def _cards(folder: Path) -> dict[str, tuple[Path, Card]]:
    found: dict[str, tuple[Path, Card]] = {}
    for file in sorted([*folder.glob("artifact/card.json"), *folder.glob("*/artifact/card.json")]):
        card = _card.read(file)
        if card.method in found:
            raise InputError(f"{folder} holds two artifacts of method {card.method!r}; a page shows one of each")
        found[card.method] = file, card
    return found


def _suite(folder: Path, summary: Summary) -> Suite:
    cases: dict[str, Case] = {}
    pictures: dict[tuple[str, str], Path] = {}
    arms = dict.fromkeys(arm.name for arm in summary.arms)
    for arm in arms:
        place = folder / "samples" / summary.suite / arm
        for row in _lines(place / "index.jsonl"):
            if row["target"] in summary.targets:
                case = from_data(Case, {key: row[key] for key in CASE_KEYS})
                cases[case.case_id] = case
                pictures[arm, case.case_id] = place / row["file"]
    sampler = _header(folder, summary.suite, BASE)["identity"]
    seen = _seen(folder, summary, cases)
    return Suite(summary, cases, pictures, seen, sampler["steps"], sampler["guidance_scale"])


def _seen(folder: Path, summary: Summary, cases: Mapping[str, Case]) -> dict[tuple[str, str], bool]:
    first = summary.arms[0].detector
    rows = (row for row in _lines(folder / "scores.jsonl") if (row["suite"], row["detector"]) == (summary.suite, first))
    found: dict[tuple[str, str], bool] = {}
    for row in rows:
        case = cases.get(row["case_id"])
        # a style can bear a concept's name: the row about the case's own concept is written first
        if case and row["concept"] == case.concept:
            found.setdefault((row["arm"], row["case_id"]), bool(row["fired"]))
    return found


def _header(folder: Path, suite: str, arm: str) -> dict[str, Any]:
    return _object(folder / "samples" / suite / arm / "arm.json", "draw the samples again")


def _object(file: Path, advice: str) -> dict[str, Any]:
    return _files.read_json(_there(file, advice))


def _lines(file: Path) -> list[dict[str, Any]]:
    return _files.read_lines(_there(file, "run expunge score again"))


def _there(file: Path, advice: str) -> Path:
    if not file.is_file():
        raise InputError(f"no such file: {file}; {advice}")
    return file
