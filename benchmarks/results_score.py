"""SCORE and its rivals in the same cells: python -m benchmarks.results_score [--suites objects] [--models emoji-unet]

A cell is a suite on a model. Every target of the suite is erased by every method at default settings with every seed,
drawn with the suite's own sampler beside the base model, also in sentences the suite does not use, judged, and
attacked. What a method or an attack refuses is kept as such. --targets N, --seeds N, --models, --suites, --methods,
--attacks and --cases take a part, and the page says which. Whatever is finished is kept, so a killed run continues; a
cell that stands in results/score.json and covers what is asked is not run again: remove it there to count it anew.
results/score.json and docs/results-score.md are written anew after every cell.
"""

import argparse
import json
import platform
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import effect, paraphrases
from benchmarks.effect_record import REFUSED
from benchmarks.score_page import OURS, page
from benchmarks.score_pictures import arms, described, distances, distances_of
from benchmarks.score_rates import Found, beside, rates, won
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.registry import catalogue as registered
from expunge.core.registry import find
from expunge.stages import _files, _outcomes
from expunge.stages.artifact import read_card
from expunge.stages.attack import attack
from expunge.stages.sample import sample
from expunge.stages.score import score
from expunge.suites.load import catalogue
from expunge.suites.load import load as load_suite

HERE = Path(__file__).parent
FOUND, PAGE = HERE / "results" / "score.json", HERE.parent / "docs" / "results-score.md"
MODELS = ("emoji-unet", "emoji-flux", "emoji-flux-distilled")
RIVALS = ("esd", "uce", "mace", "ant", "all_but_one", "erase_anything")
ATTACKS = ("soft_token", "kv_inversion", "negative_flip", "random_suffix", "relearning")
SEEDS, CASES = 3, 10


def fitting(model: str, names: Iterable[str], kind: str = "methods") -> list[str]:
    """Those methods or attacks that know the model's family."""
    family = "mmdit" if "flux" in model else "unet"
    return [name for name in names if family in find(kind, name).families]


def seeded(args: Namespace, seed: int, part: str = ".") -> Namespace:
    """The same question with one seed, and a folder of its own."""
    return Namespace(**{**vars(args), "seed": seed, "out": args.out / part / f"seed-{seed}"})


def alone(job: tuple[str, int, str], args: Namespace) -> None:
    """Erase and nothing else: in a process of its own, whose peak is then the erasure's."""
    target, seed, method = job
    torch.set_num_threads(1)
    effect.erased(target, method, seeded(args, seed))


def one(job: tuple[str, int], args: Namespace) -> None:
    """Erase, draw and judge one target with one seed; attack it with the first one."""
    target, seed = job
    mine = seeded(args, seed)
    effect.one(target, mine)
    made = [effect.place(target, mine) / m for m in args.methods if not refusal(effect.place(target, mine), m)]
    rephrase(target, made, seeded(args, seed, "paraphrases"))
    for source in made if seed == args.seeds[0] else ():
        for name in fitting(args.model, args.attacks, "attacks"):
            attempted(source, name, args)


def refusal(folder: Path, name: str) -> str:
    """Why something was refused here; "" where it was not."""
    said = folder / f"{name}.{REFUSED}"
    return said.read_text() if said.exists() else ""


def rephrase(target: str, made: Iterable[Path], args: Namespace) -> None:
    """Draw and judge a target's paraphrases, in a run folder of their own: their rows are no cases of the suite."""
    folder, run = effect.place(target, args), Run()
    suite = paraphrases.written(load_suite(args.suite), args.out)
    base = args.out.parent / "base"
    sample(None, suite, folder, run, model=args.model, targets=[target], cache=base, batch=effect.BATCH)
    for source in made:
        sample(source, suite, folder, run, targets=[target], batch=effect.BATCH)
    score(folder, run)


def attempted(source: Path, name: str, args: Namespace) -> None:
    """Attack one erasure; where the attack refuses it, the reason stands in place of the result."""
    folder = source / _outcomes.FOLDER
    said = folder / f"{name}.{REFUSED}"
    try:
        attack(source, name, Run(), options=effect.told(args, name), suite=args.suite, cases=args.cases)
    except InputError as error:
        if (folder / f"{name}.json").exists():
            raise  # the answer to another question is in the way: the attack has refused nothing
        folder.mkdir(exist_ok=True)
        said.write_text(str(error))
    else:
        said.unlink(missing_ok=True)


def attacked(method: str, args: Namespace) -> dict[str, Found]:
    """Attack → prompts won of all targets' together, with controls, curve and budget; and which targets it refused."""
    found: dict[str, Found] = {}
    for name in fitting(args.model, args.attacks, "attacks"):
        places = {t: effect.place(t, seeded(args, args.seeds[0])) / method / _outcomes.FOLDER for t in args.targets}
        refused = {target: why for target, place in places.items() if (why := refusal(place, name))}
        files = [place / f"{name}.json" for target, place in places.items() if target not in refused]
        held = [_outcomes.load(file) for file in files if file.exists()]
        if held or refused:
            found[name] = {**(won(held) if held else {}), "targets": len(held), "refused": refused}
    return found


def rows(args: Namespace, part: str = ".") -> list[Found]:
    """Decisions of the targets, seeds and methods that are asked about, with the run they belong to."""
    found = []
    for seed in args.seeds:
        for target in args.targets:
            folder = effect.place(target, seeded(args, seed, part))
            for row in effect.rows(folder.parent, folder.name):
                if row["arm"] in ("base", *args.methods):
                    found.append({**row, "run": f"{seed}/{target}"})
    return found


def paraphrased(args: Namespace) -> list[Found]:
    """The same of the targets' paraphrases, as a role of their own."""
    return [{**row, "role": "paraphrase"} for row in rows(args, "paraphrases") if row["role"] == "target"]


def asked(args: Namespace) -> Found:
    """What a cell is about, and how much there would be of each."""
    suite = load_suite(args.suite)
    return {
        "targets": args.targets,
        "suite_sha256": suite.digest,
        "seeds": args.seeds,
        "methods": args.methods,
        "attacks": fitting(args.model, args.attacks, "attacks"),
        "cases": args.cases,
        "set": sorted(args.set),
        "whole": {
            "targets": len(suite.targets),
            "seeds": SEEDS,
            "methods": len(fitting(args.model, (OURS, *RIVALS))),
            "attacks": len(fitting(args.model, ATTACKS, "attacks")),
            "cases": CASES,
        },
    }


def covers(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a cell that was counted holds all that is asked, under the same settings."""
    parts = ("targets", "seeds", "methods", "attacks")
    same = all(held[key] == wanted[key] for key in ("cases", "set", "suite_sha256"))
    return same and all(set(held[key]) >= set(wanted[key]) for key in parts)


def cell(args: Namespace) -> Found:
    """Everything measured of one suite on one model."""
    found = [*rows(args), *paraphrased(args)]
    jobs = {(t, s): effect.place(t, seeded(args, s)) for t in args.targets for s in args.seeds}
    cards = {
        m: [read_card(place / m / "artifact") for place in jobs.values() if not refusal(place, m)] for m in args.methods
    }
    refused = {
        m: {f"{t}, seed {s}": why for (t, s), place in jobs.items() if (why := refusal(place, m))} for m in args.methods
    }
    pictures, counted = arms(jobs.values(), ("base", *args.methods)), rates(found)
    seen = {detector: described(pictures, detector) for detector in counted}
    rivals = [m for m in args.methods if m != OURS and cards[m]] if cards.get(OURS) else []
    return {
        "asked": asked(args),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "rates": counted,
        "distance": {d: distances(seen[d], d) for d in counted},
        "against": {
            d: {m: {**beside(OURS, m, found, d), "distance": distances_of((OURS, m), seen[d])} for m in rivals}
            for d in counted
        },
        "seconds": {m: round(sum(c.run.seconds for c in held) / len(held), 1) for m, held in cards.items() if held},
        "peak_bytes": {m: max(c.run.peak_bytes for c in held) for m, held in cards.items() if held},
        "refused": {m: why for m, why in refused.items() if why},
        "attacks": {m: attacked(m, args) for m in args.methods},
    }


def carried_out(args: Namespace) -> Found:
    """Run what is missing of a cell, then count it."""
    jobs = [(target, seed) for seed in args.seeds for target in args.targets]
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(args.processes, maxtasksperchild=1) as pool:
        pool.map(partial(alone, args=args), [(*job, m) for job in jobs for m in args.methods], chunksize=1)
    with context.Pool(args.processes) as pool:
        pool.map(partial(one, args=args), jobs, chunksize=1)
    return cell(args)


def narrowed(args: Namespace, model: str, suite: str) -> Namespace:
    """The question of one cell: the first so many targets of the suite, the methods that know the model."""
    targets = [target.concept.name for target in load_suite(suite).targets][: args.targets]
    mine = {"model": model, "suite": suite, "targets": targets, "seeds": list(range(args.seeds))}
    mine |= {"methods": fitting(model, args.methods), "out": args.out / model / suite}
    return Namespace(**{**vars(args), **mine})


def todo(args: Namespace, cells: Mapping[str, Found]) -> dict[str, Namespace]:
    """The cells that must be run; ends where one would take the place of a cell that it does not cover."""
    found = {}
    for model, suite in ((m, s) for m in args.models for s in args.suites):
        name, mine = f"{model}, {suite}", narrowed(args, model, suite)
        held = cells.get(name, {}).get("asked")
        if held and covers(held, asked(mine)):
            continue
        if held and not covers(asked(mine), held):
            raise SystemExit(f"{FOUND.name} holds {name} with {held}, which is not part of what is asked: remove it")
        found[name] = mine
    return found


def several(text: str) -> int:
    """Read a number of things, at least one."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; legal: 1 or more")
    return int(text)


def main() -> None:
    """Run what is missing, cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--suites", nargs="*", default=list(catalogue()), choices=catalogue())
    parser.add_argument("--methods", nargs="*", default=[OURS, *RIVALS], choices=sorted(registered("methods")))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=sorted(registered("attacks")))
    parser.add_argument("--seeds", type=several, default=SEEDS, help="erasures of each target; attacks meet the first")
    parser.add_argument("--targets", type=several, help="of each suite, from the top; default: all")
    parser.add_argument("--cases", type=several, default=CASES, help="prompts of an attack")
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.FIELD=VALUE", help="or ATTACK.FIELD=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs") / "score")
    parser.add_argument("--processes", type=several, default=2)
    args = parser.parse_args()
    cells = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    for name, mine in todo(args, cells).items():
        cells[name] = carried_out(mine)
        _files.write_bytes(FOUND, (json.dumps(cells, indent=1) + "\n").encode())
        _files.write_bytes(PAGE, page(cells, MODELS, catalogue()).encode())


if __name__ == "__main__":
    main()
