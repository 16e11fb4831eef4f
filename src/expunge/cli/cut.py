"""A smaller suite: one target, fewer cases, chosen by rule and written down as a suite of its own."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from expunge.core.errors import InputError
from expunge.core.records import Case
from expunge.suites.load import COLUMNS, load

SHARES = {"target": 0.3, "synonym": 0.25, "retain": 0.45}


def cut_suite(name: str, target: str, count: int, folder: Path) -> tuple[Path, str]:
    """Write a suite of one target (the first if empty) and about `count` cases; return its folder and the target.

    Cases are taken evenly over the file, a new prompt before a second seed, so that prompts stay as many as can be.
    Raises InputError for an unknown suite or target, and for a folder that holds another suite: samples drawn from it
    would lose what they were drawn from.
    """
    import tomli_w

    from expunge.stages._files import write_bytes

    suite = load(name)
    chosen = suite.target(target or suite.targets[0].concept.name)
    cases = choose(suite.cases_for(chosen.concept.name), count)
    table = {
        "name": f"{suite.name}-part",
        "version": suite.version,
        "sampler": asdict(suite.sampler),
        "detectors": list(suite.detectors),
        "target": [
            {
                "name": chosen.concept.name,
                "kind": chosen.concept.kind,
                "prompts": list(chosen.concept.prompts),
                "synonyms": list(chosen.synonyms),
                "anchor": chosen.anchor,
                "retain": [concept.name for concept in chosen.retain],
            }
        ],
    }
    for file, data in {"suite.toml": tomli_w.dumps(table).encode(), "cases.csv": _table(cases)}.items():
        if (folder / file).exists() and (folder / file).read_bytes() != data:
            raise InputError(f"{folder} holds another suite, target or number of cases; choose another folder")
        write_bytes(folder / file, data)
    return folder, chosen.concept.name


def choose(cases: Sequence[Case], count: int) -> list[Case]:
    """Choose about `count` cases in the shares of SHARES; a role that has too few leaves its places empty."""
    if len(cases) <= count:
        return list(cases)
    picked = {
        case.case_id
        for role, share in SHARES.items()
        for case in _evenly([case for case in cases if case.role == role], round(count * share))
    }
    return [case for case in cases if case.case_id in picked]


def _evenly(cases: Sequence[Case], count: int) -> list[Case]:
    if len(cases) <= count:
        return list(cases)
    firsts = list({case.prompt: case for case in reversed(cases)}.values())[::-1]
    if len(firsts) >= count:
        return [firsts[n * len(firsts) // count] for n in range(count)]
    rest = [case for case in cases if case not in firsts]
    return firsts + _evenly(rest, count - len(firsts))


def _table(cases: Sequence[Case]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(case) for case in cases)
    return stream.getvalue().encode()
