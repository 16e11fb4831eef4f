"""What settings do to four concepts that no suite aims at: python -m benchmarks.validation [--methods uce] [--undo]

Defaults are chosen here and judged elsewhere (benchmarks.effect). Each target is erased toward its anchor while six
neighbours are retained, and drawn ten times, each neighbour three times. With --undo every embedding row e of the
prompt is replaced by A e, A = argmin sum_l ||W'_l A - W_l||^2 over the text-reading layers: the closed-form inversion
of keys and values. Prints counts per method and target, and their sums.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.effect import told
from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.inversion import Sent, inverse_reading
from expunge.stages.recipe import settings

JUDGES = ("judge_cnn", "judge_vit")
STYLES = ("flat", "3d", "ink", "sticker", "sepia")
GROUNDS = ("pink", "yellow", "green", "blue", "gray")
AIMS = {
    "banana": ("lemon", ("lemon", "carrot", "pineapple", "grapes", "cherries", "watermelon")),
    "cat": ("fox", ("fox", "dog", "lion", "panda", "rabbit", "pig")),
    "bus": ("train", ("train", "car", "bicycle", "helicopter", "house", "rocket")),
    "bell": ("trumpet", ("trumpet", "alarm clock", "trophy", "top hat", "violin", "key")),
}


def undone(base: Generator, erased: Generator) -> Generator:
    """The erased model under the closed-form inversion; itself where no text-reading layer changed."""
    return erased.view(guards=[Sent(inverse_reading(base, erased))])


def asks(target: str) -> Iterator[tuple[str, str]]:
    """Concept and prompt of every picture: ten of the target, three of each neighbour."""
    for i, style in enumerate(STYLES):
        for j in range(2):
            yield target, sentence(target, style, i + 2 * j)
    for i, name in enumerate(AIMS[target][1]):
        for j in range(3):
            yield name, sentence(name, STYLES[(i + 2 * j) % 5], i + j)


def sentence(name: str, style: str, ground: int) -> str:
    """The plain template of emoji world."""
    return f"a {style} picture of a {name} on a {GROUNDS[ground % 5]} background"


@dataclass(frozen=True)
class Count:
    """Recognised pictures of one target and its neighbours after one method, by judge."""

    method: str
    target: str
    hits: dict[str, tuple[int, int]]


def one(job: tuple[str, str], args: argparse.Namespace) -> Count:
    """Erase, draw and count; method "base" erases nothing."""
    torch.set_num_threads(1)
    method, target = job
    model = load(args.model)
    if method != "base":
        anchor, retain = AIMS[target]
        cls, request = find("methods", method), Request.of(target, anchor=anchor, retain=retain)
        patch = cls(**settings(cls, told(args, method))).erase(model, request, Run())
        model = undone(model, patch.on(model)) if args.undo else patch.on(model)
    names, prompts = zip(*asks(target), strict=True)
    with torch.no_grad():
        images = model.generate(prompts, seeds=range(900, 900 + len(prompts)), guidance_scale=4.0, steps=25)
    hits = {}
    for name in JUDGES:
        judge = find("detectors", name)()
        seen = [bool(judge.fires(image[None], Concept.of(c))) for image, c in zip(images, names, strict=True)]
        hits[name] = (sum(seen[:10]), sum(seen[10:]))
    return Count(method, target, hits)


def show(counts: list[Count]) -> None:
    """Print a line per method and target, and the sum of each method."""
    for method in dict.fromkeys(count.method for count in counts):
        mine = [count for count in counts if count.method == method]
        for count in mine:
            print(
                f"{method:14} {count.target:8}", *(f"{j} {t}/10 {r}/18" for j, (t, r) in count.hits.items()), sep="  "
            )
        sums = {j: [sum(count.hits[j][k] for count in mine) for k in (0, 1)] for j in JUDGES}
        n = len(mine)
        print(f"{method:14} {'all':8}", *(f"{j} {t}/{10 * n} {r}/{18 * n}" for j, (t, r) in sums.items()), sep="  ")


def main() -> None:
    """Count every method on every target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--methods", nargs="*", default=["uce", "rece", "project", "esd", "all_but_one"])
    parser.add_argument("--targets", nargs="*", default=list(AIMS), choices=list(AIMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--undo", action="store_true", help="feed the closed-form inversion of keys and values")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    jobs = [(method, target) for method in ("base", *args.methods) for target in args.targets]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        show(pool.map(partial(one, args=args), jobs, chunksize=1))


if __name__ == "__main__":
    main()
