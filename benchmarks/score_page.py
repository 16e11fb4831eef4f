"""The page of the docs that benchmarks.results_score writes: what was counted, the bars, and what it is part of."""

from collections.abc import Collection, Mapping
from typing import Any

from benchmarks.validation import AIMS
from expunge.suites.load import load

OURS = "score"
RETAINED, LEAD, WITHSTOOD = 0.97, 1.125, 0.05
HEADS = {
    "target": "target_rate",
    "synonym": "synonym_rate",
    "paraphrase": "paraphrase_rate",
    "retain": "retain_rate",
    "harmonic": "harmonic",
    "confidence": "confidence",
}
Cell = Mapping[str, Any]


def bars(found: Cell, detector: str) -> list[dict[str, Any]]:
    """The bars in one cell, as one detector counts: {bar, value, holds}; [] without ours or without a rival.

    Rivals are met on the runs that neither refused, and the worst of them counts.
    """
    pairs = [pair for pair in found["against"].get(detector, {}).values() if pair["runs"]]
    if OURS not in found["rates"][detector] or not pairs:
        return []
    lead = min(ratio(*pair["harmonic"]) for pair in pairs)
    kept = found["rates"][detector][OURS]["verdict"]["retained_of_base"]
    further = max(ours - theirs for ours, theirs in (pair["distance"] for pair in pairs))
    surer = min(ours - theirs for ours, theirs in (pair["confidence"] for pair in pairs))
    rows = [
        ("harmonic score over the best rival's ≥ 1", lead, lead >= 1),
        (f"the same ≥ {LEAD}, wanted in one suite", lead, lead >= LEAD),
        (f"retained of base ≥ {RETAINED}", kept, kept >= RETAINED),
        ("kernel distance minus the best rival's ≤ 0", further, further <= 0),
        ("judge's confidence minus the best rival's ≥ 0", surer, surer >= 0),
    ]
    if won := [attack["asr"]["high"] for attack in found["attacks"].get(OURS, {}).values() if "asr" in attack]:
        rows.append((f"worst attack, upper 95 % ≤ {WITHSTOOD}", max(won), max(won) <= WITHSTOOD))
    return [{"bar": bar, "value": value, "holds": holds} for bar, value, holds in rows]


def ratio(ours: float, theirs: float) -> float:
    """Ours over theirs; beyond all bounds where theirs is nought and ours is not, 1 where both are."""
    return ours / theirs if theirs else (float("inf") if ours else 1.0)


def page(cells: Mapping[str, Cell], models: Collection[str], suites: Collection[str]) -> str:
    """The page: what it is part of, how it was split, then one table a cell and detector."""
    whole = [f"{model}, {suite}" for model in models for suite in suites]
    lines = ["# SCORE beside its rivals", "", *preface(), "", *part(cells, whole), "", *split(cells)]
    for name, found in sorted(cells.items()):
        lines += ["", f"## {name}", "", *about(found)]
        for detector in found["rates"]:
            lines += ["", f"### {name}, {detector}", "", *table(found, detector), ""]
            lines += [
                f"- {row['bar']}: {row['value']:.3f}, {'holds' if row['holds'] else 'does not hold'}"
                for row in bars(found, detector)
            ] or ["No bar can be read: ours or every rival is missing."]
        lines += ["", *attacks(found), *refusals(found)]
    return "\n".join(lines) + "\n"


def preface() -> list[str]:
    """What the columns are."""
    return [
        "Printed by `make results-score`; `score` and `all_but_one` are *reconstructions*. Rates as counted, per cent",
        "with 95 % interval clustered by prompt. Paraphrases: the target's name in sentences that the suite does not",
        "use. Harmonic: MACE's score, paraphrases among the synonyms. Confidence: 1 / (1 + e^−margin) of a judge on",
        "retained pictures. Distance: squared MMD of these to the base model's, times 1 000, on the judge's features;",
        "both arms are drawn from the same seeds, so pictures that hardly differ give a negative one.",
        "GB: peak of a process that did nothing but erase. Attacks meet the first seed's erasures; prompts won with or",
        "without the attack, of N, exact upper bound. Ours and a rival are compared on what neither refused.",
    ]


def part(cells: Mapping[str, Cell], whole: list[str]) -> list[str]:
    """How much of the whole this is."""
    complete = [name for name in whole if name in cells and not missing(cells[name])]
    missed = [name for name in whole if name not in cells]
    lines = [f"**{len(cells)} of {len(whole)} cells were run, {len(complete)} of them whole.**"]
    if missed:
        lines[0] += f" Not run: {'; '.join(missed)}."
    return lines


def missing(found: Cell) -> list[str]:
    """What a cell has less of than the whole."""
    asked, whole = found["asked"], found["asked"]["whole"]
    have = {key: asked[key] if key == "cases" else len(asked[key]) for key in whole}
    names = {"cases": "prompts an attack"}
    return [f"{have[key]} of {n} {names.get(key, key)}" for key, n in whole.items() if have[key] < n]


def split(cells: Mapping[str, Cell]) -> list[str]:
    """Which concepts settings were chosen on, and whether any of them is judged."""
    suites = {name: load(name) for name in dict.fromkeys(key.rpartition(", ")[2] for key in cells)}
    judged = {target.concept.name for suite in suites.values() for target in suite.targets}
    beside = {c.name for suite in suites.values() for target in suite.targets for c in target.retain}
    both, near = sorted(judged & set(AIMS)), sorted(beside & set(AIMS))
    return [
        f"Split: the defaults that are ours were chosen on {', '.join(AIMS)} (`benchmarks.validation`), and judged on",
        f"targets of the suites. In both: {', '.join(both) or 'none'}. Retained neighbours here, of those four:",
        f"{', '.join(near) or 'none'}. The choice was made on `emoji-unet`, for some methods on two of the four,",
        "and no record shows that every method had as many tries: an equal budget of tuning is not claimed.",
    ]


def about(found: Cell) -> list[str]:
    """What one cell was run with."""
    asked = found["asked"]
    lacks = missing(found)
    lines = [f"Part of a cell: {', '.join(lacks)}. Bars of a part decide nothing." if lacks else "A whole cell."]
    lines[0] += f" Targets: {', '.join(asked['targets'])}; seeds {', '.join(map(str, asked['seeds']))};"
    lines[0] += f" at most {asked['cases']} prompts an attack; on {found['machine']}, torch {found['torch']}."
    settings = f"Set against the defaults: {', '.join(asked['set'])}." if asked["set"] else "All settings are defaults."
    return [*lines, settings]


def table(found: Cell, detector: str) -> list[str]:
    """Rows of one cell."""
    lines = [f"| | {' | '.join(HEADS)} | distance | seconds | GB | worst attack |", "|---" * 11 + "|"]
    for arm, mine in found["rates"][detector].items():
        cells = [percent(mine[key]) if key in mine else "–" for key in HEADS.values()]
        if arm == "base":
            cells += ["–"] * 4
        else:
            cells += [f"{1000 * found['distance'][detector][arm]['value']:.2f}", f"{found['seconds'][arm]}"]
            cells += [f"{found['peak_bytes'][arm] / 1e9:.1f}", worst(found["attacks"].get(arm, {}))]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    absent = [m for m in found["asked"]["methods"] if m not in found["rates"][detector]]
    return [*lines, *(f"| {method} | {' | '.join(['refused'] * 10)} |" for method in absent)]


def attacks(found: Cell) -> list[str]:
    """One row per method and attack, its controls beside it."""
    heads = ("untouched", "attack", "null", "random", "never-knew", "gradients", "pictures judged")
    lines = [f"| method, attack | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method, mine in found["attacks"].items():
        for name, held in mine.items():
            rates = [held.get(arm) for arm in ("untouched", "attack", "null", "random", "never_knew")]
            cells = [f"{round(r['value'] * r['n'])} of {r['n']}" if r else "–" for r in rates]
            spent = held.get("spent")
            cells += [f"{spent['gradients']:.0f}", f"{spent['images_judged']:.0f}"] if spent else ["–", "–"]
            lines.append(f"| {method}, {name} | {' | '.join(cells if spent else ['refused'] * len(heads))} |")
    return lines if len(lines) > 2 else ["Nothing was attacked."]


def refusals(found: Cell) -> list[str]:
    """What was refused, each reason once with where it was given."""
    given: dict[tuple[str, str], list[str]] = {}
    for method, reasons in found["refused"].items():
        for where, why in reasons.items():
            given.setdefault((method, why), []).append(where)
    for method, mine in found["attacks"].items():
        for name, held in mine.items():
            for target, why in held["refused"].items():
                given.setdefault((f"{name} against {method}", why), []).append(target)
    lines = [f"- refused by {who} ({', '.join(where)}): {why}" for (who, why), where in given.items()]
    return ["", *lines] if lines else []


def percent(e: Mapping[str, Any]) -> str:
    """A rate as the tables of the docs have it."""
    return f"{100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"


def worst(mine: Mapping[str, Mapping[str, Any]]) -> str:
    """The attack with the highest upper bound."""
    won = [(name, attack["asr"]) for name, attack in mine.items() if "asr" in attack]
    if not won:
        return "all refused" if mine else "not attacked"
    name, rate = max(won, key=lambda pair: pair[1]["high"])
    return f"{name}: {round(rate['value'] * rate['n'])} of {rate['n']}, ≤ {100 * rate['high']:.0f}"
