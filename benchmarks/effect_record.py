"""Decisions behind the effect tables, to which later runs add targets and methods: python -m benchmarks.effect_record

benchmarks/results/decisions/MODEL-SUITE.json holds, for every target and arm, what was set, the seconds of the erasure
and one character per picture, in the suite's order: 1 where the judge saw what was asked for. benchmarks.effect --save
adds to it; this program prints the tables it makes, in Markdown.
"""

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from expunge.core.records import Case
from expunge.suites.load import Suite, load

HOME = Path(__file__).parent / "results" / "decisions"
ROLES = ("target", "synonym", "retain", "style")
REFUSED = "refused"
Record = dict[str, dict[str, dict]]
"""Target → arm → {"set": [...], "seconds": …, detector: {role: "0110…"}}, or {"set": [...], "refused": "why"}."""


def path(model: str, suite: str) -> Path:
    """Where the decisions about a model and a suite are kept."""
    return HOME / f"{Path(model).name}-{suite}.json"


def read(model: str, suite: str) -> Record:
    """What is known so far."""
    file = path(model, suite)
    return json.loads(file.read_text())["decisions"] if file.exists() else {}


def asked(suite: Suite, target: str, role: str) -> list[Case]:
    """Cases of one role in the suite's order; the style is asked about in the neighbours' pictures."""
    wanted = "retain" if role == "style" else role
    return [case for case in suite.cases_for(target) if case.role == wanted]


def packed(found: Iterable[dict], suite: Suite, target: str) -> dict[str, dict[str, dict[str, str]]]:
    """Arm → detector → role → one character per case."""
    fired = {(r["arm"], r["detector"], r["role"], r["case_id"]): r["fired"] for r in found}
    told: dict[str, dict[str, dict[str, str]]] = {}
    for arm, detector, role in sorted({key[:3] for key in fired}):
        cases = asked(suite, target, role)
        marks = "".join(str(int(fired[arm, detector, role, case.case_id])) for case in cases)
        told.setdefault(arm, {}).setdefault(detector, {})[role] = marks
    if sum(len(marks) for arm in told.values() for seen in arm.values() for marks in seen.values()) != len(fired):
        raise SystemExit(f"the decisions about {target!r} are not those of suite {suite.name}")
    return told


def unpacked(record: Record, suite: Suite) -> list[dict]:
    """Rows as benchmarks.effect.rows gives them, with the target they belong to."""
    found = []
    for target, arms in record.items():
        for arm, held in arms.items():
            for detector in suite.detectors if REFUSED not in held else ():
                for role, marks in held[detector].items():
                    told = zip(asked(suite, target, role), marks, strict=True)
                    about = {"arm": arm, "detector": detector, "role": role, "target": target}
                    found += [{**about, "prompt": case.prompt, "fired": mark == "1"} for case, mark in told]
    return found


def add(record: Record, target: str, arm: str, held: dict) -> None:
    """Put one arm's decisions about a target in; settings of an arm must be one and the same on all targets."""
    for other, arms in record.items():
        if arm in arms and arms[arm]["set"] != held["set"]:
            raise SystemExit(f"{arm} is on record with {arms[arm]['set']} for {other}, not {held['set']}")
    record.setdefault(target, {})[arm] = held


def write(record: Record, model: str, suite: str) -> None:
    """Keep it, in the suite's order of targets, one line for each arm."""
    order = [target.concept.name for target in load(suite).targets if target.concept.name in record]
    head = {"model": Path(model).name, "suite": suite, "torch": torch.__version__, "machine": platform.machine()}
    lines = []
    for target in order:
        arms = sorted(record[target].items(), key=lambda pair: (pair[0] != "base", pair[0]))
        body = ",\n".join(f"   {json.dumps(arm)}: {json.dumps(held)}" for arm, held in arms)
        lines.append(f"  {json.dumps(target)}: {{\n{body}\n  }}")
    HOME.mkdir(parents=True, exist_ok=True)
    inner = ",\n".join(lines)
    path(model, suite).write_text(json.dumps(head)[:-1] + ',\n "decisions": {\n' + inner + "\n }}\n")


def drawn(record: Record) -> list[str]:
    """Which arms were drawn on which targets, arms of the same targets together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for arm in sorted({arm for held in record.values() for arm in held}, key=lambda arm: (arm != "base", arm)):
        groups.setdefault(tuple(target for target, held in record.items() if arm in held), []).append(arm)
    return [f"{', '.join(arms)} on {', '.join(targets)}" for targets, arms in groups.items()]


def main() -> None:
    """Print a table for each model and suite on record."""
    from benchmarks.effect import markdown

    argparse.ArgumentParser(description=__doc__).parse_args()
    for file in sorted(HOME.glob("*.json")):
        facts = json.loads(file.read_text())
        print(f"## {facts['model']}, {facts['suite']}", end="\n\n")
        print(markdown(facts["suite"], facts["decisions"]), end="\n\n")
        print("; ".join(drawn(facts["decisions"])) + ".", end="\n\n")


if __name__ == "__main__":
    main()
