"""Drift of the unconditional prediction, All but One (a reconstruction) beside ESD: python -m benchmarks.drift

Both methods erase the same targets with growing numbers of steps. After each, the target's rate on the suite's own
cases is judged and the drift mean ||eps_erased(x_t, t, "") - eps_base(x_t, t, "")||^2 is taken on 32 states of the
base model's own unconditional path. Equal erasure: for each method the first step count at which the target rate is
at or below LIMIT. --methods climbs with one of the two again, --set METHOD.FIELD=VALUE with other settings than its
defaults; the other's rungs stay as results/drift.json has them. --save writes that file.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.effect import told
from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import Generator
from expunge.core.measure import Detector
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.trajectory import uncond_drift
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
    eraser: Eraser = cls(**settings(cls, [pair.removeprefix(f"{method}.") for pair in told(args, method)]))
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
    """How another method was run on the same model and suite, and its rungs, which this run does not climb again."""
    facts = json.loads(FILE.read_text()) if FILE.exists() else {}
    if (facts.get("model"), facts.get("suite")) != (args.model, args.suite):
        return {}, []
    points = [point for row in facts["points"] if (point := Point(**row)).method not in args.methods]
    return {method: run for method, run in facts["runs"].items() if method not in args.methods}, points


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
    pairs = [(method, target) for target in targets for method in args.methods]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        climbed = pool.map(partial(climb, args=args), pairs, chunksize=1)
    runs, points = held(args)
    points += [point for rungs in climbed for point in rungs]
    where = {"machine": platform.machine(), "torch": torch.__version__}
    runs |= {method: {"set": told(args, method), **where} for method in args.methods}
    print(
        f"drift of the unconditional prediction where the target rate first falls to {LIMIT:.0%} (no anchor, n=30 each)"
    )
    for target, *ends in table(points, targets):
        cells = [f"{p.method} {p.steps:4} steps, rate {p.target_rate:4.0%}, drift {p.drift:.2e}" for p in ends]
        print(f"{target:12} {'   '.join(cells)}")
    if args.save:
        facts = {"model": args.model, "suite": args.suite, "limit": LIMIT, "detector": "judge_cnn", "seed": 0}
        facts |= {"runs": runs, "points": [vars(p) for p in points]}
        FILE.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
