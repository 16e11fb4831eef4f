"""What each method does to a suite, averaged over its targets: python -m benchmarks.effect [--suite objects]

Every target is erased by every method at default settings (or --set METHOD.FIELD=VALUE), drawn with the suite's own
sampler and seeds beside the base model, and judged. Prints pooled rates as counted (every target has equally many
cases), clustered by prompt, and writes them to results/. Finished targets are kept, so a killed run continues.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from expunge.cli.erase import build
from expunge.core.eraser import Run
from expunge.core.records import Estimate
from expunge.ops.stats import Sample, harmonic, rate
from expunge.stages.artifact import read_card
from expunge.stages.erase import erase
from expunge.stages.sample import sample
from expunge.stages.score import score
from expunge.suites.load import load

RESULTS = Path(__file__).parent / "results"
ROLES = {"target": "target_rate", "synonym": "synonym_rate", "retain": "retain_rate"}


def one(target: str, args: argparse.Namespace) -> None:
    """Erase, draw and judge one target with every method, in one run folder."""
    torch.set_num_threads(1)
    suite, folder, run = load(args.suite), args.out / target.replace(" ", "_"), Run()
    aim = suite.target(target)
    sample(None, args.suite, folder, run, model=args.model, targets=[target])
    for method in args.methods:
        recipe = build(
            model=args.model,
            targets=[aim.concept.prompts],
            anchors=[aim.anchor],
            retain=[concept.prompts for concept in aim.retain],
            kind=aim.concept.kind,
            method=method,
            settings=[pair.removeprefix(f"{method}.") for pair in args.set if pair.startswith(f"{method}.")],
            seed=0,
        )
        erase(recipe, folder / method, run)
        sample(folder / method, args.suite, folder, run, targets=[target])
    score(folder, run)


def rows(folder: Path) -> list[dict]:
    """Every decision about a case's own concept, or its style, with the case it is about."""
    found = []
    for index in folder.glob("*/samples/*/*/index.jsonl"):
        cases = {row["case_id"]: row for row in map(json.loads, index.read_text().splitlines())}
        arm, scores = index.parent.name, index.parents[3] / "scores.jsonl"
        for row in map(json.loads, scores.read_text().splitlines()):
            if row["arm"] == arm:
                case = cases[row["case_id"]]
                own = row["concept"] == case["concept"]
                found.append({**row, "role": case["role"] if own else "style", "prompt": case["prompt"]})
    return found


def pooled(found: Sequence[dict], role: str) -> Estimate | None:
    """Rate over all targets of one arm, detector and role."""
    mine = [row for row in found if row["role"] == role]
    return rate(Sample.of([r["fired"] for r in mine], [r["prompt"] for r in mine]), seed=0) if mine else None


def table(found: Sequence[dict]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Detector → arm → rate name → estimate."""
    result: dict[str, dict[str, dict[str, Estimate]]] = {}
    for detector in dict.fromkeys(row["detector"] for row in found):
        for arm in dict.fromkeys(row["arm"] for row in found):
            mine = [row for row in found if (row["detector"], row["arm"]) == (detector, arm)]
            rates = {name: pooled(mine, role) for role, name in {**ROLES, "style": "style_rate"}.items()}
            result.setdefault(detector, {})[arm] = {name: e for name, e in rates.items() if e is not None}
    return result


def show(result: dict[str, dict[str, dict[str, Estimate]]]) -> None:
    """Print one line per detector and arm."""
    for detector, arms in result.items():
        for arm, rates in sorted(arms.items(), key=lambda item: item[0] != "base"):
            cells = [f"{n.removesuffix('_rate')} {e.value:.1%} [{e.low:.1%}, {e.high:.1%}]" for n, e in rates.items()]
            if {"target_rate", "retain_rate", "synonym_rate"} <= rates.keys():
                h = harmonic(*(rates[n].value for n in ("target_rate", "retain_rate", "synonym_rate")))
                cells.append(f"H_o {h:.3f}")
            print(f"{detector:15} {arm:12} {'  '.join(cells)}")


def seconds(folder: Path, methods: Sequence[str]) -> dict[str, float]:
    """Mean wall seconds of the erasures, from their cards."""
    cards = {m: [read_card(path) for path in sorted(folder.glob(f"*/{m}/artifact"))] for m in methods}
    return {m: round(sum(c.run.seconds for c in found) / len(found), 1) for m, found in cards.items() if found}


def plain(rates: dict[str, Estimate]) -> dict[str, dict]:
    """Rates for JSON."""
    return {name: asdict(estimate) for name, estimate in rates.items()}


def main() -> None:
    """Run what is missing, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--suite", default="objects")
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=["uce", "esd", "all_but_one"])
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/effect-SUITE.json")
    args = parser.parse_args()
    args.out = args.out or Path("runs") / "effect" / args.suite
    targets = args.targets or [target.concept.name for target in load(args.suite).targets]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.map(partial(one, args=args), targets, chunksize=1)
    result = table(rows(args.out))
    show(result)
    print("mean seconds per erasure:", seconds(args.out, args.methods))
    if args.save:
        facts = {
            "model": args.model,
            "suite": args.suite,
            "targets": targets,
            "set": args.set,
            "torch": torch.__version__,
        }
        facts |= {"machine": platform.machine(), "seconds": seconds(args.out, args.methods)}
        facts["rates"] = {
            d: {a: {n: asdict(e) for n, e in r.items()} for a, r in arms.items()} for d, arms in result.items()
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"effect-{args.suite}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
