"""Whether an erasure holds at other guidance scales: python -m benchmarks.leak --model emoji-flux [--scales 1 3.5 5]

Each target of a suite is erased once per method, at the method's own settings (or --set METHOD.FIELD=VALUE, for
instance esd.embedded_scales=[3.5]), and drawn ten times at every scale with the plain template, beside the base
model. Erasures that benchmarks.effect has made are taken from there, unless something is set. Prints the share of
pictures a judge still recognises, clustered by target; --save writes it to results/leak-MODEL.json, or with --name
to results/leak-MODEL-NAME.json, and refuses a file that holds another suite or other settings.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.effect import told
from benchmarks.validation import GROUNDS, JUDGES, STYLES, sentence
from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.patch import Patch
from expunge.core.records import Estimate
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.stats import Sample, rate
from expunge.stages import artifact
from expunge.stages.recipe import settings
from expunge.suites.load import load as load_suite

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Seen:
    """Which of one target's pictures a judge recognised, at one scale."""

    method: str
    target: str
    scale: float
    hits: dict[str, list[bool]]


def one(job: tuple[str, str], args: argparse.Namespace) -> list[Seen]:
    """Erase once, draw and judge at every scale; method "base" erases nothing."""
    torch.set_num_threads(1)
    (method, target), model = job, load(args.model)
    if method != "base":
        model = change(model, method, target, args).on(model)
    return [Seen(method, target, scale, judged(model, target, scale)) for scale in args.scales]


def made_before(method: str, target: str, args: argparse.Namespace) -> Path | None:
    """The artifact that benchmarks.effect left, unless something is set for the method or there is none."""
    made: Path = args.made / target.replace(" ", "_") / method / "artifact"
    return made if made.exists() and not told(args, method) else None


def given(jobs: list[tuple[str, str]], args: argparse.Namespace) -> dict[str, dict]:
    """What was set when the erasures that benchmarks.effect left were made."""
    cards = {(m, t): artifact.read_card(made) for m, t in jobs if (made := made_before(m, t, args))}
    return {f"{m} {t}": {name: card.config[name] for name in card.given} for (m, t), card in cards.items()}


def change(model: Generator, method: str, target: str, args: argparse.Namespace) -> Patch | artifact.Artifact:
    """What takes the target out of the model."""
    if made := made_before(method, target, args):
        return artifact.load(made)
    cls, aim = find("methods", method), load_suite(args.suite).target(target)
    return cls(**settings(cls, told(args, method))).erase(model, aim.request(), Run())


@torch.no_grad()
def judged(model: Generator, target: str, scale: float) -> dict[str, list[bool]]:
    """Draw a target twice in every style and ask both judges."""
    prompts = [sentence(target, style, i + len(GROUNDS) // 2 * j) for i, style in enumerate(STYLES) for j in range(2)]
    images = model.generate(prompts, seeds=range(700, 700 + len(prompts)), guidance_scale=scale, steps=25)
    concept = Concept.of(target)
    judges = {j: find("detectors", j)() for j in JUDGES}
    return {j: [bool(judge.fires(x[None], concept)) for x in images] for j, judge in judges.items()}


def table(found: list[Seen]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Judge → method → scale → rate."""
    rows: dict[str, dict[str, dict[str, Estimate]]] = {}
    for j in JUDGES:
        for method, scale in dict.fromkeys((seen.method, seen.scale) for seen in found):
            mine = [seen for seen in found if (seen.method, seen.scale) == (method, scale)]
            fired = [(hit, seen.target) for seen in mine for hit in seen.hits[j]]
            sample = Sample.of([hit for hit, _ in fired], [target for _, target in fired])
            rows.setdefault(j, {}).setdefault(method, {})[str(scale)] = rate(sample, seed=0)
    return rows


def place(args: argparse.Namespace, what: str = "leak") -> Path:
    """The file of results, under the run's name; SystemExit where it holds another suite or other settings."""
    name = "-".join([what, Path(args.model).name, *([args.name] if args.name else [])])
    file = RESULTS / f"{name}.json"
    held = json.loads(file.read_text()) if file.exists() else {}
    for key, asked in (("suite", args.suite), ("set", args.set)):
        if held and held[key] != asked:
            raise SystemExit(f"{file.name} holds {key} {held[key]}, asked for {asked}; choose another --name")
    return file


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--suite", default="objects")
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=["uce", "esd", "all_but_one", "dve", "erase_anything"])
    parser.add_argument("--scales", nargs="*", type=float, default=[1.0, 3.5, 5.0])
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/leak-MODEL[-NAME].json")
    parser.add_argument("--name", default="", help="a run of its own in results/, such as taught-at-3.5")
    args = parser.parse_args()
    file = place(args) if args.save else None  # before anything is drawn
    args.made = Path("runs") / "effect" / Path(args.model).name / args.suite
    targets = args.targets or [target.concept.name for target in load_suite(args.suite).targets]
    jobs = [(method, target) for method in ("base", *args.methods) for target in targets]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        found = [seen for part in pool.imap(partial(one, args=args), jobs, chunksize=1) for seen in part]
    rows = table(found)
    for j, methods in rows.items():
        for method, scales in methods.items():
            cells = [f"at {s}: {e.value:6.1%} [{e.low:.1%}, {e.high:.1%}]" for s, e in scales.items()]
            print(f"{j:10} {method:14}", *cells, sep="  ")
    if file:
        facts = {"model": args.model, "suite": args.suite, "targets": targets, "set": args.set, "pictures": 10}
        facts |= {"machine": platform.machine(), "torch": torch.__version__}
        facts["made_before"] = given(jobs, args)
        facts["rates"] = {j: {m: {s: asdict(e) for s, e in r.items()} for m, r in ms.items()} for j, ms in rows.items()}
        file.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
