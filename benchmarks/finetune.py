"""What a fine-tuning step costs: python -m benchmarks.finetune [MODEL ...] [--methods METHOD ...]

Three bars for each method on each model. Passes: a step of `erase` itself, everything in it, against the forward and
backward passes its loss cannot avoid, done bare on the same rows with the same parameters trained. Speed: the same step
in the manner of the official scripts (benchmarks/finetune_reference.py) against ours, both with their trajectories.
Memory: peak bytes of the U-Net and all that training keeps beside it, official against ours. Processor time, one
thread, all works in turn between one step of the training and the next. Writes results/finetune.json.
"""

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.closed_form_setting import machine
from benchmarks.finetune_reference import LOSSES, Official, play, walked
from benchmarks.finetune_setting import MODELS, Account, Clock, Row, Rows
from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.registry import find
from expunge.models.unet import UNetGenerator

RESULT = Path(__file__).parent / "results" / "finetune.json"
REQUEST = Request.of("cat", anchor="dog", retain=("banana",))
BATCH = {"emoji-unet": 4}
"""States of a step; 1, the papers', where nothing is said."""
REPEATS = {"emoji-unet": 9}
WARM = 1
SHORT = {"pool": 4, "walk": 12, "maps": 1, "pictures": 1, "draws": 1, "pairs": 32, "refresh": 10**6}
"""What only repeats before the first step is cut short here, and counted at the default. A grid of twelve points has
one in SCORE's early stage on either model."""
GROUPS = {"ant": "all"}
RANKS = {"esd": 8, "all_but_one": 8}
"""Methods that can train factors in place of whole tensors."""
GOALS = {"esd": 2, "all_but_one": 3, "ant": 2, "score": 2}
"""Rows a pooled state is taught with."""


def graded(method: str, batch: int) -> int:
    """Rows of the student's predictions that need gradient."""
    return {"esd": batch, "all_but_one": 3 * batch, "ant": 2 * batch, "score": 3 * batch + max(1, batch // 2)}[method]


def eraser(method: str, *, batch: int, steps: int, rank: int = 0) -> Eraser:
    """The method at its defaults, but for what only repeats; rank: of factors, 0 for whole tensors."""
    cls = find("methods", method)
    told = {**SHORT, "rank": rank} if rank else SHORT
    known = {field.name for field in fields(cls)}
    made: Eraser = cls(batch=batch, steps=steps, **{name: value for name, value in told.items() if name in known})
    return made


def official(method: str, model: UNetGenerator, batch: int) -> Official:
    """The official manner on a copy of the model's U-Net, the same parameters trained."""
    rows = {name: model.encode([text]).tokens for name, text in _TEXTS.items()}
    trained = [path.removeprefix("unet.") for path in model.select(_group(method))]
    job = Official(copy.deepcopy(model.unet), model.scheduler, rows, batch, trained)
    if method in ("ant", "score"):
        job.masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in job.moved.items()}
    return job


_TEXTS = {"target": "cat", "anchor": "dog", "other": "banana", "": ""}


def _group(method: str) -> Any:
    return GROUPS.get(method, "non_cross_attention")


def bare(method: str, job: Official) -> None:
    """Forward and backward passes that the loss cannot avoid, as few and as large as they can be, and nothing else."""
    rows, batch = graded(method, job.batch), job.batch
    job.optimizer.zero_grad()  # the official step leaves its gradients
    x, t = job.latents(rows), torch.full((rows,), 500)
    said = job.student(x, t, job.texts["target"].expand(rows, -1, -1), return_dict=False)[0]
    loss = said.square().mean()
    if method == "score":
        with torch.no_grad():
            other = job.ask(job.student, job.latents(), "anchor")
        loss = loss + play(job.judge, None, said[:batch], other)
    loss.backward()
    job.optimizer.zero_grad()


def rows_asked(method: str, model: UNetGenerator, batch: int) -> None:
    """Check that a step asks the network about as many rows as the bare passes do; another number ends the command."""
    seen: list[tuple[int, int]] = []
    with Rows(model.unet) as rows:

        def progress(label: str, done: int, total: int) -> None:
            if label == "fit":
                seen.append((rows.graded, rows.plain))

        eraser(method, batch=batch, steps=2).erase(model, REQUEST, Run(progress=progress))
    found = tuple(after - before for before, after in zip(*seen, strict=True))
    expected = (graded(method, batch), batch if method == "score" else 0)
    if found != expected:
        raise SystemExit(f"{method}: a step asks about {found} rows with and without gradient, not {expected}")


def timed(method: str, name: str, model: UNetGenerator) -> list[Row]:
    """Rows of time, from one training with the other works between its steps."""
    batch, n = BATCH.get(name, 1), REPEATS.get(name, 3)
    job = official(method, model, batch)
    others: dict[str, Callable[[], object]] = {
        "passes": partial(bare, method, job),
        "official_step": partial(job.step, LOSSES[method]),
        "official_sampler_step": job.sampler_step,
    }
    rows_asked(method, model, batch)
    clock = Clock(others, warm=WARM)
    with Rows(model.unet) as rows:
        eraser(method, batch=batch, steps=n + WARM).erase(model, REQUEST, Run(progress=clock.progress))
    spent, share = clock.medians, trajectories(method)
    spent["one_row"] = spent["official_sampler_step"] / (2 * batch)
    spent["trajectory"] = spent["one_row"] * share
    spent["ours"] = spent["step"] + spent["trajectory"]
    spent["official"] = spent["official_step"] + walked(method, _walk(method)) * spent["official_sampler_step"]
    cost, speed = spent["step"] / spent["passes"], spent["official"] / spent["ours"]
    rest = f"{method}, {name}, batch {batch}"
    note = (
        f"{graded(method, batch)} rows with gradient; trajectories: ours {share:.1f} rows without gradient a step "
        f"(pool or pairs over the steps they serve), official {walked(method, _walk(method)):.1f} guided sampler steps "
        f"of the batch; both counted, one timed. {rows.graded + rows.plain} rows asked in all"
    )
    return [
        Row(f"{rest}: step / unavoidable passes", cost, "<= 1.15", cost <= 1.15, n, machine(), spent, note),
        Row(f"{rest}: official / ours, time of a step", speed, ">= 2", speed >= 2, n, machine(), spent, note),
    ]


def _walk(method: str) -> int:
    walk: int = find("methods", method)().walk
    return walk


def trajectories(method: str) -> float:
    """Rows without gradient that our trajectories cost a step at the method's defaults, guidance's two rows included.

    A state stops (walk − 1) / 2 sampler steps from noise on average. A pool serves all steps, pairs `refresh` of them.
    """
    made = find("methods", method)()
    state = made.walk - 1
    total = made.pool * (state + GOALS[method]) / made.steps
    if method == "score":
        total += made.pairs * (2 * state + 2) / made.refresh
    return float(total)


def held(method: str, name: str) -> list[Row]:
    """Peak bytes of both in their second step; ours also with activations computed again, and with factors as well."""
    batch = BATCH.get(name, 1)
    theirs = float(official_peak(method, MODELS[name](), batch))
    rows = []
    for again, rank in ((False, 0), (True, 0), *([(True, RANKS[method])] if method in RANKS else [])):
        ours = float(peak(method, MODELS[name](checkpointing=again), batch, rank))
        ratio = ours / theirs
        how = ", activations computed again" * again + f", factors of rank {rank}" * (rank > 0)
        work = f"{method}, {name}, batch {batch}{how}: ours / official, peak bytes of a step"
        figures = {"ours": ours, "official": theirs}
        rows.append(Row(work, ratio, "<= 0.5", ratio <= 0.5, 1, machine(), figures, "counted; U-Net alone"))
    return rows


def peak(method: str, model: UNetGenerator, batch: int, rank: int = 0) -> int:
    """Most bytes alive during the second step of a training, base network included."""
    account = Account(model.unet)

    def progress(label: str, done: int, total: int) -> None:
        if label == "fit":
            account.restart()

    peaks = []
    with account:
        eraser(method, batch=batch, steps=2, rank=rank).erase(
            model, REQUEST, Run(progress=progress, log=lambda *row: peaks.append(account.peak))
        )
    return peaks[-1]


def official_peak(method: str, model: UNetGenerator, batch: int) -> int:
    """The same of the official manner: both networks included."""
    job = official(method, model, batch)
    account = Account(job.student, job.teacher)
    account.count([*job.masks.values()])
    with account:
        job.step(LOSSES[method])
        account.restart()
        job.step(LOSSES[method])
    return account.peak


def write(rows: list[Row]) -> None:
    """Print rows and put them in place of their older selves in the results."""
    for row in rows:
        print(f"{row.work}: {row.ratio:.3g} (bar {row.bar}, {'holds' if row.holds else 'falls short'}, n {row.n})")
        print(f"    {json.dumps({key: float(f'{value:.4g}') for key, value in row.figures.items()})}", flush=True)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else []
    new = {row.work for row in rows}
    RESULT.write_text(
        json.dumps([r for r in known if r["work"] not in new] + [asdict(r) for r in rows], indent=1) + "\n"
    )


WORKS: Mapping[str, Callable[[str, str], list[Row]]] = {
    "time": lambda method, name: timed(method, name, MODELS[name]()),
    "memory": held,
}


def main() -> None:
    """Measure every method on every model named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--methods", nargs="*", default=list(LOSSES), metavar="METHOD", help=", ".join(LOSSES))
    parser.add_argument("--works", nargs="*", default=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models or MODELS:
        for method in args.methods:
            for work in args.works:
                write(WORKS[work](method, name))


if __name__ == "__main__":
    main()
