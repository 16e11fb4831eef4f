"""Sample, score, summarize: what `score` and `demo` share, and how rates are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expunge.cli.console import Out
from expunge.cli.places import Place
from expunge.core.errors import InputError
from expunge.core.records import Arm, Estimate, Summary
from expunge.suites.load import load

RATES = ("target_rate", "synonym_rate", "retain_rate", "style_rate", "harmonic")
HEADS = ("target", "synonyms", "neighbours", "styles", "H_o")


def measure(
    screen: Out,
    place: Place,
    folder: Path,
    suite: str | Path,
    *,
    targets: Sequence[str] = (),
    detectors: Sequence[str] = (),
    device: str = "cpu",
    cache: Path | None = None,
) -> tuple[Summary, ...]:
    """Draw a suite's cases for the base and every artifact, judge them, and return the summaries written to `folder`.

    Every artifact is asked about its own targets only. Finished images and scores are kept, so a second call only does
    what is missing. Raises InputError, before anything is drawn, for an unknown detector or a target nobody erased.
    """
    with screen.waiting("loading torch and diffusers"):
        from expunge.core.eraser import Run
        from expunge.stages.sample import sample
        from expunge.stages.score import check_detectors, score
        from expunge.stages.summarize import read, summarize

    check_detectors(detectors or load(suite).detectors)
    chosen = tuple(targets) or place.targets
    if foreign := [target for target in chosen if place.artifacts and target not in place.targets]:
        raise InputError(f"{place.run} erased {', '.join(place.targets)}, not {foreign[0]!r}; leave out --target")
    with screen.progress() as progress:
        run = Run(device=device, progress=progress)
        sample(None, suite, folder, run, model=place.model, dtype=place.dtype, targets=chosen, cache=cache)
        for artifact, erased in zip(place.artifacts, place.erased, strict=True):
            if own := [target for target in chosen if target in erased]:
                sample(artifact, suite, folder, run, targets=own)
        score(folder, run, detectors=detectors)
    summarize(folder)
    return read(folder)


def as_data(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Return summaries for machines: one row per model and detector, its rates beside each other."""
    return [
        {
            "suite": summary.suite,
            "suite_sha256": summary.suite_sha256,
            "targets": list(summary.targets),
            "arms": [_row(arm) for arm in summary.arms],
        }
        for summary in summaries
    ]


def _row(arm: Arm) -> dict[str, Any]:
    return {"arm": arm.name, "detector": arm.detector, **_plain(arm.rates), "raw": _plain(arm.raw)}


def _plain(rates: Mapping[str, Estimate]) -> dict[str, Any]:
    # every rate has its place: null where the suite has no cases for it
    return {name: asdict(rates[name]) if name in rates else None for name in RATES}


def show(screen: Out, summaries: Sequence[Summary], *, first_detector: bool = False) -> None:
    """Print the rates for people, in per cent with their intervals; optionally those of the first detector only."""
    for summary in summaries:
        arms = [arm for arm in summary.arms if not first_detector or arm.detector == summary.arms[0].detector]
        rows = [[arm.name, arm.detector, *(_cell(arm.rates.get(key)) for key in RATES)] for arm in arms]
        screen.say(f"suite {summary.suite}, {', '.join(summary.targets)}; per cent [95 % interval]")
        screen.table(("model", "detector", *HEADS), rows)


def _cell(rate: Estimate | None) -> str:
    return f"{100 * rate.value:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]" if rate else "–"
