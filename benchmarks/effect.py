"""What each method does to a suite, averaged over its targets: python -m benchmarks.effect [--suite objects]

Every target is erased by every method at default settings (or --set METHOD.FIELD=VALUE), drawn with the suite's own
sampler and seeds beside the base model, and judged. Prints pooled rates as counted (every target has equally many
cases), clustered by prompt. Finished targets are kept, so a killed run continues; --save adds the decisions to those of
earlier runs (benchmarks.effect_record) and writes the rates of all of them to results/.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks import effect_record as kept
from benchmarks.effect_record import REFUSED
from expunge.cli.erase import build
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.records import Estimate
from expunge.ops.stats import Sample, harmonic_estimate, rate
from expunge.stages._training import Foreign
from expunge.stages.artifact import read_card
from expunge.stages.erase import erase
from expunge.stages.sample import sample
from expunge.stages.score import score
from expunge.suites.load import load

RESULTS = Path(__file__).parent / "results"
ROLES = {"target": "target_rate", "synonym": "synonym_rate", "retain": "retain_rate"}
TARGET, RETAINED = 0.15, 0.90
BATCH = 40
Rates = dict[str, Estimate]


def one(target: str, args: argparse.Namespace) -> None:
    """Erase, draw and judge one target with every method, in one run folder; a refusal is kept, and is a result."""
    torch.set_num_threads(1)
    folder, run = place(target, args), Run()
    base = args.out.parent / "base"
    sample(None, args.suite, folder, run, model=args.model, targets=[target], cache=base, batch=BATCH)
    for method in args.methods:
        if erased(target, method, args):
            sample(folder / method, args.suite, folder, run, targets=[target], batch=BATCH)
    score(folder, run)


def place(target: str, args: argparse.Namespace) -> Path:
    """The run folder of a target."""
    return args.out / target.replace(" ", "_")


def erased(target: str, method: str, args: argparse.Namespace) -> bool:
    """Erase a target with a method; False where it refuses, and then the reason stands beside its folder."""
    aim, folder = load(args.suite).target(target), place(target, args)
    recipe = build(
        model=args.model,
        targets=[aim.concept.prompts],
        anchors=[aim.anchor],
        retain=[concept.prompts for concept in aim.retain],
        kind=aim.concept.kind,
        method=method,
        settings=told(args, method),
        seed=args.seed,
    )
    said = folder / f"{method}.{REFUSED}"
    try:
        erase(recipe, folder / method, Run())
    except InputError as error:
        if isinstance(error, Foreign) or (folder / method / "artifact").exists():
            raise  # another recipe's artifact or training is in the way: the method has refused nothing
        folder.mkdir(parents=True, exist_ok=True)
        said.write_text(str(error))
        return False
    said.unlink(missing_ok=True)
    return True


def rows(folder: Path, target: str = "*") -> list[dict]:
    """Every decision about a case's own concept, or its style, with the case it is about."""
    found = []
    for index in folder.glob(f"{target}/samples/*/*/index.jsonl"):
        cases = {row["case_id"]: row for row in map(json.loads, index.read_text().splitlines())}
        arm, scores = index.parent.name, index.parents[3] / "scores.jsonl"
        for row in map(json.loads, scores.read_text().splitlines()):
            if row["arm"] == arm:
                case = cases[row["case_id"]]
                own = row["concept"] == case["concept"]
                found.append(
                    {
                        **row,
                        "role": case["role"] if own else "style",
                        "prompt": case["prompt"],
                        "target": case["target"],
                    }
                )
    return found


def gathered(found: Sequence[dict], role: str) -> Sample | None:
    """Decisions of one role over all targets, clustered by prompt."""
    mine = [row for row in found if row["role"] == role]
    return Sample.of([r["fired"] for r in mine], [r["prompt"] for r in mine]) if mine else None


def estimates(found: Sequence[dict], detector: str) -> Rates:
    """Rates of one arm as one detector counted them, and H_o."""
    samples = {name: gathered(found, role) for role, name in {**ROLES, "style": "style_rate"}.items()}
    rates = {name: rate(s, seed=0) for name, s in samples.items() if s is not None}
    parts = (samples["target_rate"], samples["retain_rate"], samples["synonym_rate"])
    if all(part is not None for part in parts):
        rates["harmonic"] = harmonic_estimate(parts, (None, None, None), detector, seed=0)
    return rates


def table(found: Sequence[dict]) -> dict[str, dict[str, Rates]]:
    """Detector → arm → rate name → estimate, the base model first."""
    result: dict[str, dict[str, Rates]] = {}
    for detector in sorted({row["detector"] for row in found}):
        for arm in sorted({row["arm"] for row in found}, key=lambda arm: (arm != "base", arm)):
            mine = [row for row in found if (row["detector"], row["arm"]) == (detector, arm)]
            result.setdefault(detector, {})[arm] = estimates(mine, detector)
    return result


def facing(found: Sequence[dict], arm: str) -> list[dict]:
    """The base model's rows about the targets that an arm erased."""
    targets = {row["target"] for row in found if row["arm"] == arm}
    return [row for row in found if row["arm"] == "base" and row["target"] in targets]


def verdict(rates: Rates, base: Rates) -> dict[str, float | bool]:
    """Whether the arm erases (target at most TARGET) and retains (at least RETAINED of the base model's rate)."""
    kept = rates["retain_rate"].value / base["retain_rate"].value
    erases, retains = rates["target_rate"].value <= TARGET, kept >= RETAINED
    return {"retained_of_base": kept, "erases": erases, "retains": retains}


def show(result: dict[str, dict[str, Rates]]) -> None:
    """Print one line per detector and arm."""
    for detector, arms in result.items():
        for arm, rates in arms.items():
            cells = [f"{n.removesuffix('_rate')} {e.value:.1%} [{e.low:.1%}, {e.high:.1%}]" for n, e in rates.items()]
            if arm != "base":
                said = verdict(rates, arms["base"])
                cells.append(f"retains {said['retained_of_base']:.1%} of base")
                cells.append("holds" if said["erases"] and said["retains"] else "falls short")
            print(f"{detector:10} {arm:12} {'  '.join(cells)}")


def seconds(folder: Path, methods: Sequence[str]) -> dict[str, float]:
    """Mean wall seconds of the erasures, from their cards."""
    cards = {m: [read_card(path) for path in sorted(folder.glob(f"*/{m}/artifact"))] for m in methods}
    return {m: round(sum(c.run.seconds for c in found) / len(found), 1) for m, found in cards.items() if found}


def plain(found: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """Detector → arm → rates for JSON, each arm but the base with its verdict against the base on its own targets."""
    rates: dict[str, dict[str, dict]] = {}
    for detector, arms in table(found).items():
        mine = [row for row in found if row["detector"] == detector]
        for arm, own in arms.items():
            held = rates.setdefault(detector, {}).setdefault(arm, {n: asdict(estimate) for n, estimate in own.items()})
            if arm != "base":
                held["verdict"] = verdict(own, estimates(facing(mine, arm), detector))
    return rates


def told(args: argparse.Namespace, method: str) -> list[str]:
    """What --set says of a method, as FIELD=VALUE, in order."""
    return sorted(pair.removeprefix(f"{method}.") for pair in args.set if pair.startswith(f"{method}."))


def recorded(args: argparse.Namespace, method: str) -> list[str]:
    """The same, as it stands in results."""
    return [f"{method}.{pair}" for pair in told(args, method)]


def save(args: argparse.Namespace, targets: Sequence[str]) -> None:
    """Add this run's decisions to the record, and write the rates of all that is on record."""
    suite, record = load(args.suite), kept.read(args.model, args.suite)
    for target in targets:
        folder = args.out / target.replace(" ", "_")
        for arm, seen in kept.packed(rows(folder.parent, folder.name), suite, target).items():
            spent = None if arm == "base" else round(read_card(folder / arm / "artifact").run.seconds, 1)
            kept.add(record, target, arm, {"set": recorded(args, arm), "seconds": spent, **seen})
        for file in folder.glob(f"*.{REFUSED}"):
            kept.add(record, target, file.stem, {"set": recorded(args, file.stem), REFUSED: file.read_text()})
    kept.write(record, args.model, args.suite)
    facts = {"model": args.model, "suite": args.suite, "bars": {"target_rate": TARGET, "retained_of_base": RETAINED}}
    arms = sorted({arm for held in record.values() for arm in held})
    facts["targets"] = {arm: [target for target, held in record.items() if arm in held] for arm in arms}
    file = RESULTS / f"effect-{Path(args.model).name}-{args.suite}.json"
    facts["rates"] = plain(kept.unpacked(record, suite))
    facts["earlier"] = earlier(json.loads(file.read_text()) if file.exists() else {}, arms)
    file.write_text(json.dumps(facts, indent=1) + "\n")


def earlier(old: dict, arms: Sequence[str]) -> dict:
    """What was written of arms before decisions were kept, its base beside it, until every one has been run again."""
    held = old.get("earlier") or {
        key: old[key] for key in ("targets", "set", "torch", "seconds", "rates") if key in old
    }
    missing = {arm for rates in held.get("rates", {}).values() for arm in rates} - set(arms)
    return held if missing and isinstance(held.get("targets"), list) else {}


def markdown(name: str, record: kept.Record) -> str:
    """One row per arm and judge: per cent and 95 % interval, and mean seconds of an erasure."""
    suite = load(name)
    columns = ("targets", "target", "synonyms", "neighbours", "style", "of base retained", "seconds")
    lines = [f"| method, judge | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    found = kept.unpacked(record, suite)
    rates = plain(found)
    for arm in sorted({row["arm"] for row in found}, key=lambda arm: (arm != "base", arm)):
        mine = [held[arm] for held in record.values() if arm in held and REFUSED not in held[arm]]
        named = [target for target, held in record.items() if REFUSED in held.get(arm, {})]
        count = f"{len(mine)}, refused: {', '.join(named)}" if named else str(len(mine))
        spent = "–" if arm == "base" else f"{sum(held['seconds'] for held in mine) / len(mine):.1f}"
        for judge in suite.detectors:
            own = rates[judge][arm]
            cells = [per_cent(own.get(f"{role}_rate")) for role in kept.ROLES]
            share = f"{own['verdict']['retained_of_base']:.1%}"[:-1] if arm != "base" else "–"
            row = f"{arm}, {judge.removeprefix('judge_')}"
            lines.append(f"| {' | '.join([row, count, *cells, share, spent])} |")
    return "\n".join(lines)


def per_cent(rate: dict | None) -> str:
    """A rate and its interval in per cent."""
    return "–" if rate is None else f"{rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]".replace("%", "")


def main() -> None:
    """Run what is missing, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--suite", default="objects")
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=["uce", "esd", "all_but_one"])
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--seed", type=int, default=0, help="of the erasures; pictures have the suite's own")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/effect-MODEL-SUITE.json")
    args = parser.parse_args()
    args.out = args.out or Path("runs") / "effect" / Path(args.model).name / args.suite
    targets = args.targets or [target.concept.name for target in load(args.suite).targets]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.map(partial(one, args=args), targets, chunksize=1)
    show(table(rows(args.out)))
    print("mean seconds per erasure:", seconds(args.out, args.methods))
    if args.save:
        save(args, targets)


if __name__ == "__main__":
    main()
