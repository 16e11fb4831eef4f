"""How fast the closed-form engine is: python -m benchmarks.closed_form [WORK ...]

Each work is done by the engine and by a reference of what the official scripts compute, in turn, in one process; the
ratio is that of the medians. Both read the same stand-in texts and edit weights of the real models' shapes. Before the
clock runs, both are compared in float64 (1e-10) and each in float32 with the float64 reference (3e-3); a difference
ends the command. Writes results/closed-form.json.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import closed_form_reference as reference
from benchmarks.closed_form_reference import Pair, Scales, Sentences
from benchmarks.closed_form_setting import (
    SD14,
    SDXL,
    WINDOW,
    Row,
    Shapes,
    machine,
    medians,
    peak_extra,
    texts,
    weights,
    worst,
)
from expunge.ops.fusion import Factors, fused, refined, row_gram, row_shift
from expunge.ops.ridge import output_gram, residual_rows, shared_edit
from expunge.patches.operator import SharedEdit

RESULT = Path(__file__).parent / "results" / "closed-form.json"
EXACT, SINGLE = 1e-10, 3e-3
ARTISTS = 1734
START = Scales(lam=0.5, erase=1.0, preserve=1.0)
Cast = Callable[[Tensor], Tensor]
Edit = Callable[[Sequence[Tensor], Cast], list[Tensor]]


def uce(pairs: Sequence[Pair], kept: Sequence[Tensor], scales: Scales) -> SharedEdit:
    """UCE by the engine."""
    keys, goals = (torch.cat([torch.atleast_2d(rows) for rows in side]) for side in zip(*pairs, strict=True))
    held = torch.cat([keys[:0], *(torch.atleast_2d(rows) for rows in kept)])
    gain = torch.full((len(keys),), scales.erase, dtype=torch.float64)
    retain_gain = torch.full((len(held),), scales.preserve, dtype=torch.float64)
    return shared_edit(keys, goals, gain, held, retain_gain, scales.lam)


def rece(
    old: Sequence[Tensor],
    edit: SharedEdit,
    pairs: Sequence[Pair],
    kept: Sequence[Tensor],
    scales: Scales,
    *,
    penalty: float,
    epochs: int,
) -> SharedEdit:
    """RECE by the engine, from UCE's edit on."""
    gram = output_gram(old)
    for _ in range(epochs):
        found = [(residual_rows(rows, gram, edit, penalty), goal.double()) for rows, goal in pairs]
        edit = edit.then(uce(found, [rows.double() for rows in kept], scales))
    return edit


def applied(old: Sequence[Tensor], edit: SharedEdit) -> list[Tensor]:
    """Edited copies of the weights."""
    new = [weight.clone() for weight in old]
    edit.apply_(new)
    return new


def errors(old: Sequence[Tensor], mine: Edit, theirs: Edit) -> dict[str, float]:
    """Compare engine and reference in both precisions; raises if they differ by more than they may."""
    truth = theirs([weight.double() for weight in old], Tensor.double)
    found = {
        "float64": worst(mine([weight.double() for weight in old], Tensor.double), truth),
        "float32": worst(mine(old, Tensor.float), truth),
        "reference_float32": worst(theirs(old, Tensor.float), truth),
    }
    if not (found["float64"] <= EXACT and found["float32"] <= SINGLE):
        raise SystemExit(f"engine and reference differ: {found}; legal: {EXACT} in float64, {SINGLE} in float32")
    return found


def cast(
    pairs: Sequence[Pair], kept: Sequence[Tensor], to: Callable[[Tensor], Tensor]
) -> tuple[list[Pair], list[Tensor]]:
    """Texts in another precision."""
    return [(to(old), to(new)) for old, new in pairs], [to(rows) for rows in kept]


def one_concept(work: str, shapes: Shapes, bar: float, n: int, step: int) -> list[Row]:
    """UCE of 2025: one row sent to another, nothing retained; the reference on every step-th matrix only."""
    old, rows = weights(shapes), texts(2, shapes[0])
    pairs = [(rows[0, 3], rows[1, 2])]
    part = old[::step]
    error = errors(
        part[:: max(1, len(part) // 4)],
        lambda w, to: applied(w, uce(*cast(pairs, [], to), START)),
        lambda w, to: reference.uce_2025(w, *cast(pairs, [], to), START),
    )
    spent = medians(
        {
            "engine": lambda: uce(pairs, [], START).apply_(old),
            "once": lambda: [weight.mul_(1.0) for weight in old],
            "reference": lambda: reference.uce_2025(part, pairs, [], START),
        },
        n,
    )
    spent["reference"] *= len(old) / len(part)
    note = "" if step == 1 else f"reference timed on every {step}th matrix, {len(part)} of {len(old)}, times {step}"
    ratio, share = spent["reference"] / spent["engine"], spent["engine"] / spent["once"]
    table = [Row(work, ratio, f">= {bar:g}", ratio >= bar, n, machine(), spent, error, note)]
    if bar == 50:
        text = "the same against reading and writing the weights once, in place"
        table.append(Row(text, share, "<= 2", share <= 2, n, machine(), spent, error))
    return table


def uce_sd14() -> list[Row]:
    """UCE of 2025 on SD 1.4."""
    return one_concept("UCE-2025, one concept, SD1.4 shapes", SD14, 50, n=11, step=1)


def uce_sdxl() -> list[Row]:
    """UCE of 2025 on SDXL."""
    return one_concept("UCE-2025, one concept, SDXL shapes", SDXL, 100, n=3, step=10)


def artists() -> list[Row]:
    """UCE of 2023 with all artists retained; what the reference repeats is timed piecewise and counted."""
    old, rows, scales = weights(SD14), texts(ARTISTS + 3, SD14[0]), Scales(lam=0.5, erase=1.0, preserve=0.1)
    pairs, kept, some = [(rows[0, 2:], rows[1, 2:])], list(rows[2:]), [9, 19]
    narrow = [old[index] for index in some]
    quick = partial(reference.uce_2023, outer=reference.product)
    error = errors(
        narrow,
        lambda w, to: applied(w, uce(*cast(pairs, kept, to), scales)),
        lambda w, to: quick(w, *cast(pairs, kept, to), scales),
    )
    encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)).eval()
    ids, batch, n = torch.randint(1000, 40000, (16, WINDOW)), 16, 3
    layers, count = len(old), len(kept)
    read = torch.inference_mode()(encoder)
    spent = medians(
        {
            "engine_encode_16": lambda: read(ids),
            "engine_algebra": lambda: uce(pairs, kept, scales).apply_(old),
            "reference_encode_8_by_2": lambda: [read(pair) for pair in ids.split(2)],
            "reference_one_text_in_all_layers": lambda: [
                reference.retained(old, kept[0], layer, scales) for layer in range(layers)
            ],
            "reference_inverses": lambda: reference.uce_2023(old, pairs, [], scales),
        },
        n,
    )
    passes = layers * (count + 1)
    spent["engine"] = spent["engine_encode_16"] * (count + 2) / batch + spent["engine_algebra"]
    spent["reference"] = spent["reference_encode_8_by_2"] / 8 * passes + spent["reference_inverses"]
    spent["reference"] += spent["reference_one_text_in_all_layers"] * count
    ratio = spent["reference"] / spent["engine"]
    note = (
        f"reference: {passes} encoder passes of 2 prompts, {count} retained texts in each of {layers} layers; engine: "
        f"{count + 2} prompts once each in batches of {batch}. Encoder of random weights, timed on 16 prompts and "
        f"multiplied; reference's sums timed on one text in all layers and multiplied; engine's algebra timed whole"
    )
    work = f"UCE-2023, {ARTISTS} retained texts, SD1.4 shapes, text encoder included"
    return [Row(work, ratio, ">= 50", ratio >= 50, n, machine(), spent, error, note)]


def rece_sd14() -> list[Row]:
    """RECE, three epochs from UCE's weights, the authors' settings for nudity."""
    old, rows, scales, n = weights(SD14), texts(3, SD14[0]), Scales(lam=0.1, erase=1.0, preserve=0.1), 3
    tail, pairs, kept = [(rows[0, 2:], rows[1, 2:])], [(rows[0], rows[1])], [rows[2]]

    def mine(own: Sequence[Tensor], to: Cast) -> SharedEdit:
        begin = uce(*cast(tail, kept, to), START)
        return rece(own, begin, *cast(pairs, kept, to), scales, penalty=0.1, epochs=3)

    def theirs(own: Sequence[Tensor], to: Cast) -> list[Tensor]:
        now = reference.uce_2023(own, *cast(tail, kept, to), START)
        return reference.rece(own, now, *cast(pairs, kept, to), scales, penalty=0.1, epochs=3)

    error = errors(old[9::10], lambda w, to: applied(w, mine(w, to)), theirs)
    now = reference.uce_2023(old, tail, kept, START, outer=reference.product)
    own = [weight.clone() for weight in old]
    spent = medians(
        {
            "engine": lambda: mine(old, Tensor.float).apply_(own),
            "reference_epoch": lambda: reference.rece(old, now, pairs, kept, scales, penalty=0.1, epochs=1),
        },
        n,
    )
    spent["reference"] = 3 * spent["reference_epoch"]
    ratio = spent["reference"] / spent["engine"]
    note = (
        "reference timed on one epoch, times 3: every epoch does the same work. The engine is timed on all three "
        "and on UCE's edit to start from"
    )
    return [Row("RECE, 3 epochs, SD1.4 shapes", ratio, ">= 30", ratio >= 30, n, machine(), spent, error, note)]


def mace(concepts: Sequence[Sentences], prior: Tensor, ridge: float) -> tuple[SharedEdit, dict[str, Factors]]:
    """MACE's two closed forms by the engine; the concepts are read twice, and nothing of them is kept but moments."""
    shift, gram = torch.zeros_like(prior), torch.zeros_like(prior)
    for concept in concepts:
        old = concept.old.flatten(0, 1)
        shift, gram = shift + row_shift(old, concept.new.flatten(0, 1)), gram + row_gram(old)
    edit = refined(shift, gram, prior, ridge)
    learned = (
        (row_gram(each.old.flatten(0, 1)), {str(layer): pair for layer, pair in enumerate(each.factors)})
        for each in concepts
    )
    return fused(edit, learned, prior, ridge)


def fused_into(weights: Sequence[Tensor], change: tuple[SharedEdit, dict[str, Factors]]) -> None:
    """Apply a shared edit and factors to weights in place."""
    edit, factors = change
    edit.apply_(weights)
    for layer, (down, up) in factors.items():
        weight = weights[int(layer)]
        weight.addmm_(up.to(weight.dtype), down.to(weight.dtype))


def sentences(shapes: Shapes, count: int, prompts: int) -> list[Sentences]:
    """Stand-ins of what MACE reads of concepts: sentences about each and its anchor, and a rank-1 adapter a layer."""
    rng = torch.Generator().manual_seed(5)
    width, outs = shapes
    rows = texts(2 * count * prompts, width).unflatten(0, (count, 2, prompts))
    factors = [
        [(torch.randn(1, width, generator=rng) * 0.03, torch.randn(out, 1, generator=rng) * 0.03) for out in outs]
        for _ in range(count)
    ]
    return [Sentences(old, new, own) for (old, new), own in zip(rows, factors, strict=True)]


def other(concept: Sentences, to: Cast, layers: Sequence[int] | None = None) -> Sentences:
    """The same sentences in another precision, with the adapters of some layers."""
    chosen = concept.factors if layers is None else [concept.factors[layer] for layer in layers]
    return Sentences(to(concept.old), to(concept.new), [(to(down), to(up)) for down, up in chosen])


def mace_sd14() -> list[Row]:
    """MACE's refinement and fusion of 100 concepts, 30 sentences each; the reference on one concept, times 100."""
    old, count, prompts, pool, ridge, n = weights(SD14), 100, 30, 4, 10.0, 3
    some = sentences(SD14, pool, prompts)
    held = texts(4, SD14[0], seed=9).flatten(0, 1)
    prior, layer = held.T @ held, [9]

    def mine(own: Sequence[Tensor], to: Cast) -> list[Tensor]:
        new = [weight.clone() for weight in own]
        fused_into(new, mace([other(c, to, layer) for c in some[:3]], to(prior).double(), ridge))
        return new

    def theirs(own: Sequence[Tensor], to: Cast) -> list[Tensor]:
        return reference.mace(own, [other(c, to, layer) for c in some[:3]], to(prior), ridge)

    error = errors([old[layer[0]]], mine, theirs)
    own = [weight.clone() for weight in old]
    whole = [some[i % pool] for i in range(count)]

    def engine() -> None:
        fused_into(own, mace(whole, prior.double(), ridge))

    extra = peak_extra(engine)
    spent = medians(
        {
            "engine": engine,
            "reference_one_concept": lambda: reference.mace(old, some[:1], prior, ridge),
            "reference_inverses": lambda: reference.mace(old, [], prior, ridge),
        },
        n,
    )
    spent["reference"] = count * spent["reference_one_concept"] - (count - 1) * spent["reference_inverses"]
    ratio, megabytes = spent["reference"] / spent["engine"], extra / 1e6
    note = (
        f"reference timed on one concept and on none, the difference times {count}; its stored values of all concepts "
        f"are left out. The engine is timed on {count} concepts, {pool} different ones in turn. Text encoder and "
        "training of adapters are in neither"
    )
    work = "MACE refinement and fusion, 100 concepts, SD1.4 shapes"
    memory = "the same, the engine's peak memory beyond weights and texts, MB"
    return [
        Row(work, ratio, ">= 40", ratio >= 40, n, machine(), spent, error, note),
        Row(
            memory, megabytes, "<= 300", megabytes <= 300, 1, machine(), spent, error, "resident memory of the process"
        ),
    ]


def many() -> list[Row]:
    """UCE of 2023 for 1, 10, 100 and 1 000 concepts at once: seconds, and the slope of their logarithms."""
    old, rows, n, counts = weights(SD14), texts(2001, SD14[0]), 3, (1, 10, 100, 1000)
    kept, error, runs = [rows[2000]], {}, {}
    own = [weight.clone() for weight in old]
    for count in counts:
        pairs = [(rows[2 * i, 2:], rows[2 * i + 1, 2:]) for i in range(count)]
        quick = partial(reference.uce_2023, outer=reference.product)
        found = errors(
            [old[9]],
            lambda w, to, p=pairs: applied(w, uce(*cast(p, kept, to), START)),
            lambda w, to, p=pairs, q=quick: q(w, *cast(p, kept, to), START),
        )
        error |= {f"{kind}_{count}": value for kind, value in found.items()}
        runs[str(count)] = lambda p=pairs: uce(p, kept, START).apply_(own)
    spent = medians(runs, n)
    slopes = [math.log10(spent[str(10 * count)] / spent[str(count)]) for count in counts[:-1]]
    note = "log10 slopes per decade " + ", ".join(f"{slope:.2f}" for slope in slopes) + "; ratio: the steepest"
    work = "UCE-2023, 1 to 1000 concepts, SD1.4 shapes, slope of time"
    return [Row(work, max(slopes), "<= 1", max(slopes) <= 1, n, machine(), spent, error, note)]


WORKS = {"uce": uce_sd14, "artists": artists, "rece": rece_sd14, "mace": mace_sd14, "sdxl": uce_sdxl, "many": many}


def main() -> None:
    """Do every work named, by default all; print each row and put it in place of its older self in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="*", metavar="WORK", help=", ".join(WORKS))
    args = parser.parse_args()
    for name in args.works or WORKS:
        rows = WORKS[name]()
        for row in rows:
            spent = "  ".join(f"{key} {value:.4g} s" for key, value in row.seconds.items())
            print(f"{row.work}: {row.ratio:.3g} (bar {row.bar}, {'holds' if row.holds else 'falls short'}, n {row.n})")
            print(f"    {spent}\n    {row.error}\n    {row.note}", flush=True)
        known, new = json.loads(RESULT.read_text()) if RESULT.exists() else [], {row.work for row in rows}
        known = [row for row in known if row["work"] not in new] + [asdict(row) for row in rows]
        RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
