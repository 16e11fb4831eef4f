"""By which text route an erased model still hears the target: python -m benchmarks.routes --targets strawberry [--save]

A flow model hears a prompt by token rows and by one pooled vector. Each target of a suite is erased once per method, at
the method's own settings (or --set METHOD.FIELD=VALUE), and drawn with the suite's sentences, seeds and sampler: asked
for by both routes, by its token rows beside the empty prompt's pooled vector, and by its pooled vector beside the empty
prompt's rows. The unchanged model is drawn alike. Erasures that benchmarks.effect has made are taken from there, unless
something is set. Prints the share of pictures in which a judge sees the target, with exact intervals; --save writes it
to results/routes-MODEL.json, or with --name to results/routes-MODEL-NAME.json.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.leak import change, given, place
from benchmarks.validation import JUDGES
from expunge.core.condition import Condition
from expunge.core.generator import Generator
from expunge.core.records import Case, Estimate
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.stats import clopper_pearson
from expunge.patches.guard import PassGuard
from expunge.suites.load import load as load_suite

ROUTES = ("both", "tokens", "pooled")
"""Which route asks for the target; the other one says what it says of an empty prompt."""


@dataclass(frozen=True)
class Mixed(PassGuard):
    """Lets the network hear the token rows of some prompts and the pooled vectors of others."""

    tokens: Condition
    pooled: Condition

    def condition(self, cond: Condition) -> Condition:
        """Replace what was encoded."""
        return replace(self.tokens, pooled=self.pooled.pooled)


@dataclass(frozen=True)
class Seen:
    """In which of one target's pictures a judge saw it, by the route that asked."""

    method: str
    target: str
    route: str
    hits: dict[str, list[bool]]


def cases(suite: str, target: str, count: int) -> list[Case]:
    """The first of the suite's sentences about a target."""
    return [case for case in load_suite(suite).cases_for(target) if case.role == "target"][:count]


def heard(model: Generator, route: str, prompts: list[str]) -> Generator:
    """The model as it hears prompts by one route alone, or by both."""
    if route == "both":
        return model
    asked, silent = model.encode(prompts), model.encode([""] * len(prompts))
    return model.view(guards=[Mixed(asked, silent) if route == "tokens" else Mixed(silent, asked)])


def one(job: tuple[str, str], args: argparse.Namespace) -> list[Seen]:
    """Erase once, draw and judge by every route; method "base" erases nothing."""
    torch.set_num_threads(1)
    (method, target), model = job, load(args.model)
    patch = None if method == "base" else change(model, method, target, args)
    suite, asked = load_suite(args.suite), cases(args.suite, target, args.pictures)
    prompts, seeds = [case.prompt for case in asked], [case.seed for case in asked]
    how = {"guidance_scale": suite.sampler.guidance_scale, "steps": suite.sampler.steps}
    found = []
    for route in ROUTES:
        view = heard(model, route, prompts)  # before the method's own guards, if it has any
        images = (patch.on(view) if patch else view).generate(prompts, seeds=seeds, **how)
        hits = {j: find("detectors", j)().fires(images, suite.target(target).concept).tolist() for j in JUDGES}
        found.append(Seen(method, target, route, hits))
    return found


def table(found: list[Seen]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Judge → method → route → rate."""
    rows: dict[str, dict[str, dict[str, Estimate]]] = {}
    for j in JUDGES:
        for method, route in dict.fromkeys((seen.method, seen.route) for seen in found):
            hits = [hit for s in found if (s.method, s.route) == (method, route) for hit in s.hits[j]]
            rows.setdefault(j, {}).setdefault(method, {})[route] = clopper_pearson(sum(hits), len(hits))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--suite", default="objects")
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=["uce", "esd", "all_but_one", "dve", "erase_anything"])
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--pictures", type=int, default=20, help="of each target, by each route")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/routes-MODEL[-NAME].json")
    parser.add_argument("--name", default="", help="a run of its own in results/")
    args = parser.parse_args()
    file = place(args, "routes") if args.save else None  # before anything is drawn
    args.made = Path("runs") / "effect" / Path(args.model).name / args.suite
    targets = args.targets or [target.concept.name for target in load_suite(args.suite).targets]
    jobs = [(method, target) for method in ("base", *args.methods) for target in targets]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        found = [seen for part in pool.imap(partial(one, args=args), jobs, chunksize=1) for seen in part]
    rows = table(found)
    for j, methods in rows.items():
        for method, routes in methods.items():
            cells = [f"{r}: {e.value:6.1%} [{e.low:.1%}, {e.high:.1%}]" for r, e in routes.items()]
            print(f"{j:10} {method:14}", *cells, sep="  ")
    if file:
        facts = {"model": args.model, "suite": args.suite, "targets": targets, "set": args.set}
        facts |= {"pictures": args.pictures, "sampler": asdict(load_suite(args.suite).sampler), "erasing seed": 0}
        facts["seeds"] = {t: [case.seed for case in cases(args.suite, t, args.pictures)] for t in targets}
        facts |= {"machine": platform.machine(), "torch": torch.__version__}
        facts["made_before"] = given(jobs, args)
        facts["rates"] = {
            j: {m: {r: asdict(e) for r, e in rs.items()} for m, rs in ms.items()} for j, ms in rows.items()
        }
        file.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
