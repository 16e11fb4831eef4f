"""What is left of a picture's structure after All but One (a reconstruction), ESD and UCE.

python -m benchmarks.structure --targets strawberry

Each method erases a target at default settings, anchor and neighbours as the suite has them (ESD has no use for an
anchor). The suite's target cases are drawn by the erased and by the base model under equal seeds. Per judge: mean
cosine distance 1 - cos(f(x), f(x')) of its features f to the base's picture x', mean confidence max_j softmax(z)_j over
concepts (is an object whole?), and how often it recognises target and anchor, clustered by prompt. Arm "anchor" is the
base model asked for the anchor in the same sentence under the same seed: what a perfect replacement would draw. Every
finished arm is kept in results/structure.json, so a killed run continues.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.records import Case
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.stats import Sample, rate
from expunge.suites.load import Suite
from expunge.suites.load import load as load_suite

RESULTS = Path(__file__).parent / "results" / "structure.json"
METHODS = ("all_but_one", "esd", "uce")
BASE, ANCHOR = "base", "anchor"
Record = dict[str, dict[str, dict]]
"""Target → arm → {"n", "seconds", judge: {"distance", "confidence", "target", "anchor"}}."""


class Looks(Protocol):
    """What is asked of a judge."""

    def features(self, images: Tensor) -> Tensor:
        """Vectors behind the decision."""
        ...

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per head."""
        ...

    def fires(self, images: Tensor, concept: Concept) -> Tensor:
        """Whether each picture shows a concept."""
        ...


def seen(judge: Looks, images: Tensor, base: Tensor, prompts: Sequence[str], request: Request) -> dict:
    """What a judge sees of one arm's pictures, row by row beside the base's under the same prompt and seed."""
    here, there = (judge.features(each).flatten(1) for each in (images, base))
    told = {"target": request.target[0], "anchor": request.anchor[0]}
    rates = {
        name: asdict(rate(Sample.of(judge.fires(images, concept).tolist(), prompts), seed=0))
        for name, concept in told.items()
    }
    return {
        "distance": float((1 - torch.cosine_similarity(here, there)).mean()),
        "confidence": float(judge.logits(images)["concept"].softmax(1).amax(1).mean()),
        **rates,
    }


def drawn(model: Generator, suite: Suite, cases: Sequence[Case], swap: tuple[str, str] = ("", "")) -> Tensor:
    """Pictures of the cases with the suite's sampler and seeds, one phrase of every prompt swapped for another."""
    prompts = [case.prompt.replace(*swap) if swap[0] else case.prompt for case in cases]
    if swap[0] and any(swap[0] not in case.prompt for case in cases):
        raise SystemExit(f"a prompt does not hold {swap[0]!r}, so that it has no twin about {swap[1]!r}")
    sampler = suite.sampler
    with torch.no_grad():
        return model.generate(
            prompts, seeds=[case.seed for case in cases], guidance_scale=sampler.guidance_scale, steps=sampler.steps
        )


def chosen(suite: Suite, target: str, pictures: int) -> list[Case]:
    """So many of the target's cases, evenly over the file."""
    cases = [case for case in suite.cases_for(target) if case.role == "target"]
    if not 1 <= pictures <= len(cases):
        raise SystemExit(f"{pictures} pictures; legal: 1 to {len(cases)}")
    return [cases[i * len(cases) // pictures] for i in range(pictures)]


def one(arm: str, model: Generator, request: Request, suite: Suite, cases: Sequence[Case]) -> tuple[Tensor, float]:
    """Pictures of one arm that is not the base's own, and the seconds its erasure took."""
    target, anchor = next(iter(request.pairs))
    if arm == ANCHOR:
        return drawn(model, suite, cases, (target, anchor)), 0.0
    start = time.perf_counter()
    patch = find("methods", arm)().erase(model, request, Run())
    seconds = time.perf_counter() - start
    return drawn(patch.on(model), suite, cases), seconds


def read(file: Path) -> Record:
    """What is known so far."""
    return json.loads(file.read_text())["arms"] if file.exists() else {}


def write(file: Path, record: Record, model: str, suite: str) -> None:
    """Keep it, whole or not at all."""
    facts = {"model": model, "suite": suite, "machine": platform.machine(), "torch": torch.__version__, "seed": 0}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**facts, "arms": record}, indent=1) + "\n")
    os.replace(partial, file)


def table(record: Record) -> list[str]:
    """One Markdown row for each target, arm and judge."""
    lines = [
        "| target | arm, judge | n | distance to base | confidence | target [95 %] | anchor [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, arms in record.items():
        for arm, held in arms.items():
            for name, row in ((key, value) for key, value in held.items() if isinstance(value, dict)):
                cells = [f"{100 * e['value']:.0f} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]" for e in _rates(row)]
                what = f"| {target} | `{arm}`, {name} | {held['n']} | {row['distance']:.3f} | {row['confidence']:.2f} |"
                lines.append(f"{what} {' | '.join(cells)} |")
    return lines


def _rates(row: dict) -> tuple[dict, dict]:
    return row["target"], row["anchor"]


def fill(record: Record, target: str, args: argparse.Namespace, judges: dict[str, Looks], file: Path) -> None:
    """Draw and judge what is missing about one target, keeping each arm as it is done."""
    model, suite = load(args.model), load_suite(args.suite)
    request, cases = suite.target(target).request(), chosen(suite, target, args.pictures)
    if request.anchor[0] is None:
        raise SystemExit(f"{target!r} has no anchor in suite {args.suite}")
    arms, base = record.setdefault(target, {}), None
    for arm in (BASE, ANCHOR, *args.methods):
        if arms.get(arm, {}).get("n") == len(cases):
            continue
        base = drawn(model, suite, cases) if base is None else base
        images, seconds = one(arm, model, request, suite, cases) if arm != BASE else (base, 0.0)
        looks = {name: seen(judge, images, base, [c.prompt for c in cases], request) for name, judge in judges.items()}
        arms[arm] = {"n": len(cases), "seconds": round(seconds, 1), **looks}
        write(file, record, args.model, args.suite)


def main() -> None:
    """Fill, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--suite", default="objects")
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--pictures", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    judges = {name: find("detectors", name)() for name in load_suite(args.suite).detectors}
    record = read(RESULTS)
    for target in args.targets:
        fill(record, target, args, judges, RESULTS)
    print("\n".join(table(record)))


if __name__ == "__main__":
    main()
