"""What the template shows, as plain values: grids, table rows, changes, method cards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from expunge.core.card import Card
from expunge.core.outcome import CONTROLS, Outcome
from expunge.core.records import Case, Estimate
from expunge.report import words
from expunge.report.pictures import data_address
from expunge.report.plot import GONE, KEPT, MARKER_WORDS, layer_plot, rate_plot
from expunge.report.read import Findings, Suite

EMBEDDED = Path(__file__).parent.parent / "embedded"
SHOWN = 8
"""Pictures per arm in each part of the grid."""


@dataclass(frozen=True)
class Tile:
    """One picture: its address, what it was asked to show, and whether the detector saw that."""

    address: str
    alt: str
    seen: bool | None


@dataclass(frozen=True)
class Column:
    """The pictures of one arm in one part of the grid, and how many of them were recognised."""

    arm: str
    tiles: tuple[Tile, ...]
    verdict: str


@dataclass(frozen=True)
class Part:
    """One part of the before/after grid: the same prompts and seeds in every column."""

    title: str
    note: str
    tone: str
    """"low" where a recognised picture is what the eraser failed to remove, "high" where it should stay."""
    columns: tuple[Column, ...]
    prompts: tuple[str, ...]


def parts(suite: Suite, target: str) -> list[Part]:
    """Build the before/after grids of one target: target, synonyms, neighbours, styles; empty ones are left out."""
    mine = [case for case in suite.cases.values() if case.target == target]
    retain = [case for case in mine if case.role == "retain"]
    detector = suite.detectors[0]
    styled = _diagonal([case for case in retain if case.style])
    used = {case.case_id for case in styled}
    chosen = (
        (f"“{target}”, asked for by name", _note(detector, target), _by_role(mine, "target")),
        ("Asked for by a synonym", _note(detector, target), _by_role(mine, "synonym")),
        (
            "Neighbours that should stay",
            f"A filled dot: {detector} recognises the neighbour that was asked for.",
            _spread([case for case in retain if case.case_id not in used] or retain, "concept"),
        ),
        ("Styles that should stay", "Neighbours again, one style after the other.", styled),
    )
    return [_part(suite, title, note, cases) for title, note, cases in chosen if cases]


def _note(detector: str, target: str) -> str:
    return f"A filled dot: {detector} recognises “{target}”."


def _by_role(cases: Sequence[Case], role: str) -> list[Case]:
    return _spread([case for case in cases if case.role == role], "prompt")


def _spread(cases: Sequence[Case], key: str) -> list[Case]:
    """Choose up to SHOWN cases by turns over the values of a field, in file order: no picking of pretty ones."""
    queues: dict[str, list[Case]] = {}
    for case in cases:
        queues.setdefault(getattr(case, key), []).append(case)
    turns = [queue[turn] for turn in range(SHOWN) for queue in queues.values() if turn < len(queue)]
    return turns[:SHOWN]


def _diagonal(cases: Sequence[Case]) -> list[Case]:
    """Choose up to SHOWN cases, the next style and the next concept each time, so that neither hides the other."""
    styles, concepts = (list(dict.fromkeys(getattr(case, key) for case in cases)) for key in ("style", "concept"))
    first: dict[tuple[str, str], Case] = {}
    for case in cases:
        first.setdefault((case.style, case.concept), case)
    steps = [(turn + turn // len(styles), turn) for turn in range(len(styles) * len(concepts))] if styles else []
    cells = dict.fromkeys((styles[turn % len(styles)], concepts[step % len(concepts)]) for step, turn in steps)
    return [first[cell] for cell in cells if cell in first][:SHOWN]


def _part(suite: Suite, title: str, note: str, cases: Sequence[Case]) -> Part:
    columns = tuple(_column(suite, arm, cases) for arm in suite.arms)
    prompts = tuple(f"{case.prompt}, seed {case.seed}" for case in cases)
    tone = "high" if cases[0].role == "retain" else "low"
    return Part(title, note, tone, columns, prompts)


def _column(suite: Suite, arm: str, cases: Sequence[Case]) -> Column:
    tiles = tuple(
        _tile(case, arm, suite.pictures[arm, case.case_id], suite.seen.get((arm, case.case_id))) for case in cases
    )
    known = [tile.seen for tile in tiles if tile.seen is not None]
    return Column(arm, tiles, f"{sum(known)} of {len(known)} recognised" if known else "")


def _tile(case: Case, arm: str, picture: Path, seen: bool | None) -> Tile:
    verdict = {True: f"; {case.concept} recognised", False: f"; {case.concept} not recognised", None: ""}[seen]
    return Tile(data_address(picture), f"{arm}: {case.prompt}, seed {case.seed}{verdict}", seen)


def plots(suite: Suite, reconstructed: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Draw one plot per rate: (title, meaning, SVG)."""
    found = []
    for key, title in words.RATES.items():
        rows = [
            (arm.name + " †" * (arm.name in reconstructed), arm.detector, arm.rates[key])
            for arm in suite.summary.arms
            if key in arm.rates
        ]
        if rows:
            colour = GONE if _tone(key) == "low" else KEPT
            found.append((title, words.MEANING[key], rate_plot(title, rows, tone=colour)))
    return found


def _tone(rate: str) -> str:
    return "low" if rate in words.WANTED_LOW else "high"


def legend(suite: Suite) -> str:
    """Name the marker of each detector."""
    return words.listed([f"{MARKER_WORDS[i % len(MARKER_WORDS)]} {name}" for i, name in enumerate(suite.detectors)])


def table(suite: Suite) -> list[dict[str, object]]:
    """List every rate of every arm and detector with all that belongs to it."""
    return [
        {
            "arm": arm.name,
            "rate": words.RATES[key],
            "value": words.percent(estimate.value),
            "interval": words.interval(estimate),
            "raw": words.percent(arm.raw[key].value),
            "n": estimate.n,
            "clusters": estimate.clusters,
            "detector": arm.detector,
            "corrected": estimate.corrected_for or "no",
        }
        for key in words.RATES
        for arm in suite.summary.arms
        if (estimate := arm.rates.get(key))
    ]


def glance(suite: Suite) -> list[dict[str, object]]:
    """List the first detector's rates by arm: one row each, one cell per rate that the suite has."""
    mine = [arm for arm in suite.summary.arms if arm.detector == suite.detectors[0]]
    keys = [key for key in words.RATES if any(key in arm.rates for arm in mine)]
    return [
        {
            "arm": arm.name,
            "cells": [
                (words.RATES[key], words.percent(rate.value), words.interval(rate), _tone(key))
                if (rate := arm.rates.get(key))
                else (words.RATES[key], "–", "", "")
                for key in keys
            ],
        }
        for arm in mine
    ]


def changes(findings: Findings) -> list[dict[str, object]]:
    """Say what each method did to the model: where, how much, how large on disk, how long."""
    return [
        {
            "arm": arm,
            "tensors": len(card.patch.layers),
            "share": f"{100 * card.patch.share:.2f} %",
            "median": words.per_cent(median(card.patch.layers.values())) if card.patch.layers else "–",
            "largest": words.per_cent(max(card.patch.layers.values())) if card.patch.layers else "–",
            "size": words.size(card.patch.bytes),
            "seconds": words.span(card.run.seconds),
            "kind": card.patch.kind,
            "certificates": findings.cards[arm].certificates,
            "plot": layer_plot(card.patch.layers, f"Where {arm} changed the network") if card.patch.layers else "",
        }
        for arm, card in findings.cards.items()
    ]


def methods(cards: Mapping[str, Card]) -> list[dict[str, object]]:
    """Describe each method that ran: source, settings in force, whether it is a reconstruction."""
    return [
        {
            "arm": arm,
            "description": card.description,
            "paper": card.paper,
            "link": words.paper_link(card.paper),
            "reconstruction": card.claims.get("reconstruction", False),
            "config": [(key, value, key in card.given) for key, value in sorted(card.config.items())],
            "anchor": _anchor(card),
            "retain": _retain(card),
            "seed": card.run.seed,
            "device": f"{card.run.device}, {card.run.dtype}",
            "commit": _commit(card),
            "sha256": card.patch.sha256,
        }
        for arm, card in cards.items()
    ]


def _anchor(card: Card) -> str:
    if not card.claims.get("uses_anchor", True):
        return "no anchor: the method uses none"
    return words.listed([anchor.name if anchor else "nothing (unconditional)" for anchor in card.anchor])


def _retain(card: Card) -> str:
    if not card.claims.get("uses_retain", True):
        return "nothing: the method uses no retained concepts at these settings"
    return words.listed([concept.name for concept in card.retain]) or "nothing named"


def _commit(card: Card) -> str:
    if not card.run.recorded:
        return "not recorded"
    if card.run.commit is None:
        return f"none; sources {str(card.run.package_sha256)[:12]}"
    return card.run.commit[:12] + (" with local changes" if card.run.dirty else "")


def licences(findings: Findings) -> list[tuple[str, str]]:
    """Name every licence that the weights come under, and for an embedded model whose art its pictures derive from."""
    bases = sorted({(card.base.name, card.base.licence) for card in findings.cards.values()})
    return [*bases, (findings.model, words.CREDITS)] if (EMBEDDED / findings.model).is_dir() else bases


def attacks(findings: Findings) -> list[dict[str, object]]:
    """List every attack with its controls: one row per result, rates of the detector that judges."""
    return [_attack(arm, outcome) for arm, found in findings.attacks.items() for outcome in found]


def _attack(arm: str, outcome: Outcome) -> dict[str, object]:
    rates = [outcome.arms[name].rates[outcome.judge] for name in CONTROLS]
    never = outcome.arms.get("never_knew")
    return {
        "arm": arm,
        "attack": outcome.attack,
        "concept": outcome.concept,
        "threat": outcome.threat,
        "cells": [(name, _share(rate)) for name, rate in zip(CONTROLS, rates, strict=True)],
        "never": _share(next(iter(never.rates.values()))) if never else ("–", ""),
        "sentence": outcome.sentence,
        "adaptive": outcome.adaptive,
        "budget": f"{outcome.budget.gradients} gradients, {outcome.budget.denoiser_forwards} network calls, "
        f"{words.span(outcome.budget.seconds)}, k = {outcome.k}",
    }


def _share(rate: Estimate) -> tuple[str, str]:
    return f"{round(rate.value * rate.n)} of {rate.n}", words.interval(rate)
