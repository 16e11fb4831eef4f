"""How well an embedded generator draws what it is asked: python -m benchmarks.quality MODEL

Plain template, 25 DDIM steps, guidance 4, every style × concept pair of emoji world, one background a seed. Judged
by both image judges; rates are clustered by pair (its prompts differ in background only) and not corrected for the
judge.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from training import world

from expunge.core.records import Estimate
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.stats import Sample, rate
from expunge.suites.load import catalogue
from expunge.suites.load import load as load_suite

RESULTS = Path(__file__).parent / "results"
JUDGES = ("judge_cnn", "judge_vit")
HEADS = ("concept", "style", "background")
STEPS, GUIDANCE = 25, 4.0
Marks = dict[str, list[bool]]  # judge → whether its top class is right, head by head


@dataclass(frozen=True)
class Ask:
    """One picture to draw, as class numbers."""

    pair: int
    concept: int
    style: int
    background: int
    seed: int
    held_out: bool


def asks(data: world.World, pairs: Sequence[int], seeds: int) -> list[Ask]:
    """Every pair with `seeds` seeds, backgrounds in rotation."""
    return [
        Ask(
            p,
            int(data.concept[p]),
            int(data.style[p]),
            (p + k) % len(world.BACKGROUNDS),
            50_000 + k,
            bool(data.held_out[p]),
        )
        for p in pairs
        for k in range(seeds)
    ]


def judge(share: Sequence[Ask], name: str) -> list[Marks]:
    """Draw a share of the pictures and mark, per judge and head, whether the top class is the asked one."""
    torch.set_num_threads(1)
    data, model = world.load(), load(name)
    judges = {j: find("detectors", j)() for j in JUDGES}
    marks = []
    for start in range(0, len(share), 32):
        chunk = share[start : start + 32]
        colours = list(world.BACKGROUNDS)
        words = [(data.styles[a.style], data.concepts[a.concept], colours[a.background]) for a in chunk]
        prompts = [world.TEMPLATES[0].format(s=s, c=c, b=b) for s, c, b in words]
        images = model.generate(prompts, seeds=[a.seed for a in chunk], guidance_scale=GUIDANCE, steps=STEPS)
        said = {j: {h: z.argmax(1).tolist() for h, z in judges[j].logits(images).items()} for j in JUDGES}
        for i, a in enumerate(chunk):
            right = {"concept": a.concept, "style": a.style, "background": a.background}
            marks.append({j: [said[j][h][i] == right[h] for h in HEADS] for j in JUDGES})
    return marks


def suite_concepts() -> set[str]:
    """Concepts some suite asks about, targets and neighbours."""
    suites = (load_suite(name) for name in catalogue())
    return {case.concept for suite in suites for case in suite.cases}


def table(
    data: world.World, asked: Sequence[Ask], marks: Sequence[dict[str, list[bool]]]
) -> dict[str, dict[str, Estimate]]:
    """Rates per judge: all trained pairs, suite concepts, held-out pairs."""
    inside = suite_concepts()
    groups = {
        "all": [not a.held_out for a in asked],
        "suite": [not a.held_out and data.concepts[a.concept] in inside for a in asked],
        "held-out": [a.held_out for a in asked],
    }
    rows: dict[str, dict[str, Estimate]] = {}
    for j in JUDGES:
        for group, members in groups.items():
            chosen = [(a, m) for a, m, inn in zip(asked, marks, members, strict=True) if inn]
            for h, head in enumerate(HEADS):
                if chosen:
                    sample = Sample.of([m[j][h] for _, m in chosen], [a.pair for a, _ in chosen])
                    rows.setdefault(j, {})[f"{group} {head}"] = rate(sample, seed=0)
    return rows


def weakest(data: world.World, asked: Sequence[Ask], marks: Sequence[Marks]) -> dict[str, float]:
    """Concepts drawn worst: mean of both judges."""
    hits: dict[str, list[bool]] = {}
    for a, m in zip(asked, marks, strict=True):
        if not a.held_out:
            hits.setdefault(data.concepts[a.concept], []).extend(m[j][0] for j in JUDGES)
    means = {name: sum(h) / len(h) for name, h in hits.items()}
    return dict(sorted(means.items(), key=lambda item: item[1])[:15])


def main() -> None:
    """Print the table and write it to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="take one pair in EVERY, for a quick look")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    data = world.load()
    asked = asks(data, data.pairs[:: args.every], args.seeds)
    shares = [asked[i :: args.processes] for i in range(args.processes)]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        parts = pool.map(partial(judge, name=args.model), shares)
    ordered = [a for share in shares for a in share]
    marks = [m for part in parts for m in part]
    rows = table(data, ordered, marks)
    for j, rates in rows.items():
        for name, e in rates.items():
            print(f"{j:10} {name:20} {e.value:6.1%}  [{e.low:6.1%}, {e.high:6.1%}]  n={e.n} pairs={e.clusters}")
    worst = weakest(data, ordered, marks)
    print("weakest concepts:", ", ".join(f"{k} {v:.0%}" for k, v in worst.items()))
    if args.every == 1:
        facts = {"model": args.model, "steps": STEPS, "guidance_scale": GUIDANCE, "seeds": args.seeds}
        facts |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "weakest": worst}
        facts["rates"] = {j: {n: asdict(e) for n, e in r.items()} for j, r in rows.items()}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"quality-{Path(args.model).name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
