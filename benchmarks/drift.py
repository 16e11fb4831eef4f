"""Drift of the unconditional prediction, All but One (a reconstruction) beside ESD: python -m benchmarks.drift

Both methods erase the same targets with growing numbers of steps. After each, the target's rate on the suite's own
cases is judged and the drift mean ||eps_erased(x_t, t, "") - eps_base(x_t, t, "")||^2 is taken on 32 states of the
base model's own unconditional path. Equal erasure: for each method the first step count at which the target rate is
at or below LIMIT. --methods climbs with one of the two, --set METHOD.FIELD=VALUE with other settings than its
defaults; the other's rungs stay as results/drift.json has them. --save adds every target to that file as soon as it is
climbed and leaves out those that are there, so a killed run continues; other settings, another model or suite are
refused: remove there what is to be measured anew.
"""

import argparse
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.effect import recorded, told
from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Generator
from expunge.core.measure import Detector
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.trajectory import uncond_drift
from expunge.stages import _files
from expunge.stages.recipe import settings
from expunge.suites.load import Suite
from expunge.suites.load import load as load_suite

FILE = Path(__file__).parent / "results" / "drift.json"
METHODS = ("esd", "all_but_one")
LADDER = (40, 80, 160, 320)
LIMIT = 0.10
STATES = 32


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one erasure cost."""

    method: str
    target: str
    steps: int
    target_rate: float
    n: int
    drift: float


def measure(
    model: Generator, erased: Generator, suite: Suite, target: str, judge: Detector
) -> tuple[float, int, float]:
    """Target rate on the suite's target cases, their number, and the unconditional drift."""
    cases = [case for case in suite.cases_for(target) if case.role == "target"]
    with torch.no_grad():
        images = erased.generate(
            [case.prompt for case in cases],
            seeds=[case.seed for case in cases],
            guidance_scale=suite.sampler.guidance_scale,
            steps=suite.sampler.steps,
        )
        states = model.visit(model.encode([""] * STATES), rng=Run(seed=1).rng("drift"), guidance_scale=1.0, steps=25)
        drift = float(uncond_drift(erased, model, states).mean())
    return float(judge.fires(images, suite.target(target).concept).float().mean()), len(cases), drift


def climb(pair: tuple[str, str], args: argparse.Namespace) -> list[Point]:
    """Erase one target with one method, step count by step count, until it is gone."""
    method, target = pair
    torch.set_num_threads(1)
    model, suite, judge = load(args.model), load_suite(args.suite), find("detectors", "judge_cnn")()
    cls = find("methods", method)
    eraser: Eraser = cls(**settings(cls, told(args, method)))
    aim = suite.target(target)
    request = Request(target=(aim.concept,), anchor=(None,), retain=aim.retain)
    points: list[Point] = []
    for steps in LADDER:
        patch = replace(eraser, steps=steps).erase(model, request, Run())
        rate, n, drift = measure(model, patch.on(model), suite, target, judge)
        points.append(Point(method=method, target=target, steps=steps, target_rate=rate, n=n, drift=drift))
        if rate <= LIMIT:
            break
    return points


def held(args: argparse.Namespace) -> tuple[dict[str, dict], list[Point]]:
    """How every method is run, and the rungs that this run does not climb again: without --save those of other methods.

    Raises SystemExit where --save would mix models, suites or runs.
    """
    where = {"machine": platform.machine(), "torch": torch.__version__}
    mine = {method: {"set": recorded(args, method), **where} for method in args.methods}
    facts = json.loads(FILE.read_text()) if FILE.exists() else {}
    there, asked = (facts.get("model"), facts.get("suite")), (args.model, args.suite)
    runs = facts["runs"] if there == asked else {}
    points = [Point(**row) for row in facts["points"]] if there == asked else []
    if not args.save:
        return {**runs, **mine}, [point for point in points if point.method not in args.methods]
    if facts and there != asked:
        raise SystemExit(f"{FILE.name} holds {there}, asked for {asked}; move it away to begin another")
    for method, run in mine.items():
        if runs.get(method, run) != run:
            raise SystemExit(f"{method} is on record with {runs[method]}, not {run}; remove it there to measure anew")
    return {**runs, **mine}, points


def write(args: argparse.Namespace, runs: dict[str, dict], points: Iterable[Point]) -> None:
    """Keep what is known, methods and targets in their order, whole or not at all."""
    order = [target.concept.name for target in load_suite(args.suite).targets]
    rows = sorted(points, key=lambda p: (METHODS.index(p.method), order.index(p.target), p.steps))
    facts: dict[str, Any] = {"model": args.model, "suite": args.suite, "limit": LIMIT}
    facts |= {"detector": "judge_cnn", "seed": 0, "runs": runs, "points": [vars(p) for p in rows]}
    _files.write_bytes(FILE, (json.dumps(facts, indent=1) + "\n").encode())


def table(points: Sequence[Point], targets: Sequence[str]) -> list[tuple[str, Point, Point]]:
    """For each target, the last rung of both methods."""
    last = {(p.method, p.target): p for p in points}
    return [(t, *(last[m, t] for m in METHODS)) for t in targets if all((m, t) in last for m in METHODS)]


def main() -> None:
    """Climb, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--suite", default="objects")
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/drift.json")
    args = parser.parse_args()
    targets = args.targets or [target.concept.name for target in load_suite(args.suite).targets]
    runs, points = held(args)
    done = {(point.method, point.target) for point in points}
    pairs = [(m, target) for target in targets for m in args.methods if (m, target) not in done]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for rungs in pool.imap_unordered(partial(climb, args=args), pairs, chunksize=1):
            points += rungs
            if args.save:
                write(args, runs, points)
    print(
        f"drift of the unconditional prediction where the target rate first falls to {LIMIT:.0%} (no anchor, n=30 each)"
    )
    for target, *ends in table(points, targets):
        cells = [f"{p.method} {p.steps:4} steps, rate {p.target_rate:4.0%}, drift {p.drift:.2e}" for p in ends]
        print(f"{target:12} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
