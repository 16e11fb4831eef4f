"""Summarize: scores → rates with intervals, raw and corrected for the detector, the base model's row among them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.core.codec import from_data
from expunge.core.errors import InputError
from expunge.core.records import Arm, Estimate, OperatingPoint, Summary
from expunge.ops.stats import Sample, harmonic_estimate, pooled_point, rate, rogan_gladen
from expunge.stages import _files
from expunge.stages.sample import BASE
from expunge.stages.score import POINTS, SCORES, arms

SUMMARY = "summary.json"
ROLES = ("target", "synonym", "retain")
Points = Mapping[tuple[str, str, str], OperatingPoint | None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One stored decision of one detector, joined to the case it is about."""

    detector: str
    target: str
    role: str
    prompt: str
    style: str
    main: tuple[str, str]
    """Kind and name of the case's own concept."""
    asked: tuple[str, str]
    """Kind and name of what this decision is about: the case's concept, or its style."""
    fired: bool


@dataclass(frozen=True, kw_only=True)
class Scored:
    """All decisions about one arm."""

    name: str
    suite: str
    suite_sha256: str
    model_sha256: str
    targets: tuple[str, ...]
    answers: tuple[Answer, ...]

    def cut(self, targets: tuple[str, ...]) -> "Scored":
        """Keep the cases of some targets only."""
        kept = tuple(answer for answer in self.answers if answer.target in targets)
        return dataclasses.replace(self, targets=targets, answers=kept)


def summarize(run_folder: Path, *, seed: int = 0) -> Path:
    """Write summary.json from scores.jsonl and operating_points.json, and return its path.

    One Summary per suite and set of targets; in each, one Arm per model and detector, base first. Clusters are distinct
    prompts. Rates of detectors with an operating point are corrected (Rogan-Gladen); `raw` keeps what was counted.
    Raises InputError if nothing is scored, scores are incomplete, or the base model was not sampled on the same cases.
    """
    found, points = _scored(run_folder), _points(run_folder)
    summaries = [_summary(group, points, seed) for group in _groups(found)]
    _files.write_json(run_folder / SUMMARY, {"schema": 1, "suites": [dataclasses.asdict(s) for s in summaries]})
    return run_folder / SUMMARY


def read(run_folder: Path) -> tuple[Summary, ...]:
    """Read summary.json back; raises InputError for a missing or torn file."""
    table = _files.read_json(run_folder / SUMMARY)
    return tuple(from_data(Summary, entry) for entry in table["suites"])


def _scored(run_folder: Path) -> list[Scored]:
    rows = _files.read_lines(run_folder / SCORES)
    if not rows:
        raise InputError(f"no scores in {run_folder}: {SCORES} is missing or empty")
    found = []
    for header, index, folder in arms(run_folder):
        identity, cases = header["identity"], {row["case_id"]: row for row in index}
        mine = [row for row in rows if (row["suite"], row["arm"]) == (identity["suite"], identity["arm"])]
        _check_complete(mine, cases, folder)
        found.append(
            Scored(
                name=identity["arm"],
                suite=identity["suite"],
                suite_sha256=identity["suite_sha256"],
                model_sha256=identity["model_sha256"],
                targets=tuple(header["targets"]),
                answers=tuple(_answer(row, cases[row["case_id"]]) for row in mine),
            )
        )
    return found


def _check_complete(rows: Sequence[Mapping[str, Any]], cases: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    stale = [row for row in rows if row["image"] != cases.get(row["case_id"], {}).get("sha256")]
    by_detector: dict[str, set[str]] = {}
    for row in rows:
        by_detector.setdefault(row["detector"], set()).add(row["case_id"])
    if stale or not by_detector or any(seen != set(cases) for seen in by_detector.values()):
        raise InputError(f"{SCORES} does not cover the images of {folder}; run the scoring again")


def _answer(row: Mapping[str, Any], case: Mapping[str, Any]) -> Answer:
    return Answer(
        detector=row["detector"],
        target=case["target"],
        role=case["role"],
        prompt=case["prompt"],
        style=case["style"],
        main=(case["kind"], case["concept"]),
        asked=(row["kind"], row["concept"]),
        fired=row["fired"],
    )


def _groups(found: Sequence[Scored]) -> Iterator[list[Scored]]:
    """Yield the arms that share suite and targets, after the base model's answers cut to those targets."""
    for suite in dict.fromkeys(arm.suite for arm in found):
        base = next((arm for arm in found if arm.suite == suite and arm.name == BASE), None)
        others = [arm for arm in found if arm.suite == suite and arm.name != BASE]
        for targets in dict.fromkeys([arm.targets for arm in others] or [arm.targets for arm in found if arm is base]):
            if base is None or not set(targets) <= set(base.targets):
                raise InputError(
                    f"suite {suite!r} lacks samples of the base model for {', '.join(targets)}: draw them first"
                )
            group = [base.cut(targets), *(arm for arm in others if arm.targets == targets)]
            for arm in group:
                _check_alike(base, arm)
            yield group


def _check_alike(base: Scored, arm: Scored) -> None:
    if arm.suite_sha256 != base.suite_sha256:
        raise InputError(f"arms {BASE!r} and {arm.name!r} were drawn from two versions of suite {arm.suite!r}")
    if arm.model_sha256 != base.model_sha256:
        raise InputError(f"arm {arm.name!r} of suite {arm.suite!r} was made from another base model than arm {BASE!r}")


def _summary(group: Sequence[Scored], points: Points, seed: int) -> Summary:
    built = [
        _arm(arm.name, detector, [answer for answer in arm.answers if answer.detector == detector], points, seed)
        for arm in group
        for detector in dict.fromkeys(answer.detector for answer in arm.answers)
    ]
    base = group[0]
    return Summary(suite=base.suite, suite_sha256=base.suite_sha256, targets=base.targets, arms=tuple(built))


def _arm(name: str, detector: str, answers: Sequence[Answer], points: Points, seed: int) -> Arm:
    """Compute the rates of one model under one detector; a rate without cases (no synonyms, no styles) is left out."""
    main = [answer for answer in answers if answer.asked == answer.main]
    chosen = {f"{role}_rate": [answer for answer in main if answer.role == role] for role in ROLES}
    # where styles themselves are retained their rate is the retain_rate: not told twice under two names
    styled = [a for a in answers if a.role == "retain" and a.asked == ("style", a.style)]
    chosen["style_rate"] = [a for a in styled if a.asked != a.main]
    parts = {key: part for key, part in chosen.items() if part}
    samples = {key: Sample.of([a.fired for a in part], [a.prompt for a in part]) for key, part in parts.items()}
    known = {key: _shared_point(part, detector, points) for key, part in parts.items()}
    return Arm(
        name=name,
        detector=detector,
        rates=_estimates(samples, known, detector, seed),
        raw=_estimates(samples, dict.fromkeys(parts), detector, seed),
    )


def _estimates(
    samples: Mapping[str, Sample], points: Mapping[str, OperatingPoint | None], detector: str, seed: int
) -> dict[str, Estimate]:
    found = {}
    for key, sample in samples.items():
        point = points[key]
        raw = dataclasses.replace(rate(sample, seed=seed), detector=detector)
        found[key] = rogan_gladen(sample, point, detector, seed=seed) if point else raw
    if all(key in samples for key in ("target_rate", "retain_rate", "synonym_rate")):
        found["harmonic"] = harmonic_estimate(
            (samples["target_rate"], samples["retain_rate"], samples["synonym_rate"]),
            (points["target_rate"], points["retain_rate"], points["synonym_rate"]),
            detector,
            seed=seed,
        )
    return found


def _shared_point(answers: Sequence[Answer], detector: str, points: Points) -> OperatingPoint | None:
    """Pool the operating points of the concepts a rate is about; None if one of them is uncalibrated."""
    concepts = dict.fromkeys(answer.asked for answer in answers)
    found = [points[detector, kind, concept] for kind, concept in concepts]
    known = [point for point in found if point is not None]
    if len(known) != len(found):
        return None
    return pooled_point(known)


def _points(run_folder: Path) -> Points:
    table = _files.read_json(run_folder / POINTS)
    return {
        (detector, entry["kind"], entry["concept"]): from_data(OperatingPoint, entry["point"])
        if entry["point"]
        else None
        for detector, entries in table.items()
        for entry in entries
    }
