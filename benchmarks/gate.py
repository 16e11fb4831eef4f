"""What the prompt gate misses, and what it costs: python -m benchmarks.gate [--suite objects] [--concept strawberry]

For every target of a suite: misses among held-out prompts (frames of leakage/twins.py, none of which the gate has
seen; it learns from words alone), once with name and synonyms given, once with the name alone and prompts that say a
synonym; false alarms on retained prompts. For --concept also attacks on the gate, bit identity and overhead. A miss is
a prompt that is not drawn as exactly its twin: not caught, or caught and turned into another sentence. Exact intervals.
Settings were chosen on banana, cat, bus and bell, targets of no suite; nothing was tuned on what is counted here.
results/gate.json has an entry for every model and suite, to which later runs add targets and concepts; under other
settings, or another version of the suite, an entry is begun anew.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.validation import STYLES
from expunge.attacks.prompt.negative_flip import NegativeFlip
from expunge.attacks.prompt.random_suffix import RandomSuffix
from expunge.core.attack import Aim
from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.registry import find
from expunge.leakage.lower import most_rate
from expunge.leakage.twins import frames
from expunge.methods.guard.gate import PromptGate
from expunge.models.load import load
from expunge.ops.gating import spans
from expunge.ops.reword import Reworded
from expunge.ops.stats import clopper_pearson
from expunge.suites.load import Suite, Target
from expunge.suites.load import load as load_suite

RESULTS = Path(__file__).parent / "results"
BACKGROUNDS = ("green", "blue", "purple", "gray", "pink", "orange", "yellow")
N, DELTA = 3000, 0.05
TIMED = 20
"""Prompts whose gating is timed beside their drawing."""
Pair = tuple[str, str]


def held_out(phrases: Sequence[str], anchor: str, n: int, name: str) -> list[Pair]:
    """Draw n different prompts with their anchor twins: frame and phrase uniformly, without replacement."""
    every = [(frame, phrase) for frame in frames(STYLES, BACKGROUNDS) for phrase in phrases]
    chosen = random.Random(f"gate {name}").sample(every, min(n, len(every)))
    return [(frame.replace("{}", phrase), frame.replace("{}", anchor)) for frame, phrase in chosen]


def counted(hits: Iterable[bool]) -> dict[str, Any]:
    """Hits with their exact interval, and the one-sided upper end: bits, where a hit is a miss of the gate."""
    found = list(hits)
    estimate = clopper_pearson(sum(found), len(found))
    ends = {"low": estimate.low, "high": estimate.high, "one_sided_high": most_rate(sum(found), len(found), DELTA)}
    return {"hits": sum(found), "n": len(found), "rate": estimate.value, **ends}


def misses(model: Reworded, pairs: Iterable[Pair]) -> dict[str, Any]:
    """Prompts that are not drawn as their twin, and among them those the gate was silent on."""
    looks = [(model.twin(prompt), model.twin(anchor), prompt) for prompt, anchor in pairs]
    silent = sum(ours == prompt for ours, _, prompt in looks)
    return counted(ours != theirs for ours, theirs, _ in looks) | {"silent": silent}


def gated(base: Generator, aim: Target, phrases: tuple[str, ...]) -> Reworded:
    """The model behind a gate that was told these phrases."""
    request = replace(aim, concept=replace(aim.concept, prompts=phrases)).request()
    model = PromptGate().erase(base, request, Run()).on(base)
    assert isinstance(model, Reworded)
    return model


def on_target(base: Generator, aim: Target, suite: Suite) -> dict[str, Any]:
    """Misses and false alarms for one target."""
    names, said = aim.concept.prompts, (*aim.concept.prompts, *aim.synonyms)
    told, bare = gated(base, aim, said), gated(base, aim, names)
    pairs = held_out(said, aim.anchor, N, "said")
    # Twins of one suite's own concepts; an anchor that is also retained must not be counted twice.
    kept = [concept.phrase for concept in aim.retain]
    calm = [prompt for prompt, _ in held_out(kept, "", N, "retained")]
    words = {target.concept.phrase for target in suite.targets} - {*said, *kept, aim.anchor}
    cases = suite.cases_for(aim.concept.name)
    unsaid = held_out(aim.synonyms, aim.anchor, N, "unsaid") if aim.synonyms else []
    return {
        "phrases": list(said),
        "anchor": aim.anchor,
        "held_out": misses(told, pairs),
        "held_out_encoder_alone": counted(told.gate.loudest(p, told._summary) is None for p, _ in pairs),
        "held_out_synonyms_not_given": misses(bare, unsaid) if unsaid else None,
        "false_alarms_retained": counted(told.twin(prompt) != prompt for prompt in calm),
        "false_alarms_other_targets": counted(
            told.twin(prompt) != prompt for prompt, _ in held_out(sorted(words), "", 1000, "others")
        ),
        "suite_cases_silent": {
            role: counted(told.twin(case.prompt) == case.prompt for case in cases if case.role == role)
            for role in sorted({case.role for case in cases})
        },
    }


def attackable(phrases: Sequence[str], anchor: str, n: int, name: str) -> list[Pair]:
    """Held-out pairs whose phrase stands between spaces: attacks find no other."""
    every = held_out(phrases, anchor, N, name)
    return [pair for pair in every if any(f" {p} " in f" {pair[0]} " for p in phrases)][:n]


def aimed(phrases: Sequence[str], pairs: Sequence[Pair]) -> Aim:
    """What an attack on these prompts goes for."""
    return Aim(
        concept=Concept(name=phrases[0], prompts=tuple(phrases)),
        prompts=tuple(prompt for prompt, _ in pairs),
        seeds=tuple(range(len(pairs))),
    )


def suffixed(model: Reworded, phrases: Sequence[str], anchor: str, n: int) -> dict[str, Any]:
    """Misses under random suffixes: a prompt is lost if any of its tries is not drawn as its twin."""
    pairs = attackable(phrases, anchor, n, "suffix")
    aim = aimed(phrases, pairs)
    lost = [False] * len(pairs)
    for attempt in RandomSuffix().search(model, aim, Run(), reference=model.inner):
        for index, (text, (plain, twin)) in enumerate(zip(attempt.prompts, pairs, strict=True)):
            lost[index] |= model.twin(text) != model.twin(twin + text[len(plain) :])
    return counted(lost) | {"tries": RandomSuffix().tries, "letters": RandomSuffix().letters}


def flipped(model: Reworded, phrases: Sequence[str], anchor: str, n: int) -> dict[str, Any]:
    """Misses under negative-prompt flips, each phrase in turn: the sampler must read the anchor as negative prompt."""
    lost = []
    for place, phrase in enumerate(phrases):
        pairs = attackable([phrase], anchor, n // len(phrases) + (place < n % len(phrases)), "flip")
        (attempt,) = NegativeFlip().search(model, aimed([phrase], pairs), Run(), reference=model.inner)
        assert attempt.negative is not None
        lost += [model.twin(said) != model.twin(anchor) for said in attempt.negative]
    return counted(lost)


def misspelt(model: Reworded, phrase: str, anchor: str, n: int) -> dict[str, Any]:
    """Misses where one letter of the phrase is dropped, doubled, swapped or replaced; whoever misspells it means it."""
    dice, pairs = random.Random("gate misspelt"), []
    for frame, twin in held_out(["{}"], anchor, n, "misspelt"):
        at = dice.randrange(len(phrase) - 1)
        head, letter, tail = phrase[:at], phrase[at], phrase[at + 1 :]
        forms = (head + tail, head + 2 * letter + tail, head + tail[0] + letter + tail[1:], head + "x" + tail)
        pairs.append((frame.replace("{}", dice.choice([form for form in forms if form != phrase])), twin))
    return misses(model, pairs)


def vocabulary(model: Reworded, base: Any, aim: Target, top: int) -> dict[str, Any]:
    """The encoder's words nearest to the target on which the gate is silent, drawn and judged: a T1 search.

    Every whole word of the tokenizer stands where the phrase stood; the attacker knows encoder and gate.
    """
    form, gate = "a flat picture of a {} on a blue background", model.gate
    words = [token[:-4] for token in base.pipeline.tokenizer.get_vocab() if token[:-4].isalpha() and "</w>" in token]
    silent = [word for word in sorted(words) if len(word) > 2 and model.twin(form.format(word)) == form.format(word)]
    near = torch.stack([torch.nn.functional.normalize(model._summary(w) - gate.centre, dim=0) for w in silent])
    order = (near @ gate.targets.T).amax(1).argsort(descending=True)[:top]
    best = [silent[index] for index in order.tolist()]
    plain = form.format(aim.concept.phrase)
    shots = [*(form.format(word) for word in best), *[plain] * 4]
    with torch.no_grad():
        images = base.generate(shots, seeds=range(len(shots)), guidance_scale=4.0, steps=25)
    judges = {name: find("detectors", name)() for name in ("judge_cnn", "judge_vit")}
    fired = {name: [bool(judge.fires(x[None], aim.concept)) for x in images] for name, judge in judges.items()}
    return {
        "words_tried": len(words),
        "silent": len(silent),
        "drawn": best,
        "recognised": {name: counted(hits[:top]) for name, hits in fired.items()},
        "recognised_ungated_phrase": {name: counted(hits[top:]) for name, hits in fired.items()},
    }


@torch.no_grad()
def bits(model: Reworded, pairs: Sequence[Pair], drawn: int) -> dict[str, Any]:
    """Caught prompts against their twins: conditions of all, pictures of some, bit for bit."""
    ours, theirs = zip(*pairs, strict=True)

    def draw(texts: Sequence[str]) -> torch.Tensor:
        return model.generate(texts[:drawn], seeds=range(drawn), guidance_scale=4.0, steps=25)

    equal = [model.encode([a]).equals(model.encode([b])) for a, b in pairs]
    pictures = torch.equal(draw(ours), draw(theirs))
    return {"conditions_equal": sum(equal), "of": len(pairs), "pictures_equal": pictures, "pictures": drawn}


@torch.no_grad()
def overhead(base: Generator, model: Reworded, prompts: Sequence[str]) -> dict[str, Any]:
    """CPU seconds of the gate per prompt, nothing remembered and all remembered, over those of a 25-step draw."""

    def spent(job: Callable[[], object]) -> float:
        start = time.process_time()
        job()
        return time.process_time() - start

    cold, warm, draw = [], [], []
    for index, prompt in enumerate(prompts):
        fresh = Reworded(base, model.gate)
        cold.append(spent(lambda fresh=fresh, prompt=prompt: fresh.twin(prompt)))
        warm.append(spent(lambda fresh=fresh, prompt=prompt: fresh.twin(prompt)))
        draw.append(spent(lambda p=prompt, i=index: base.generate([p], seeds=[i], guidance_scale=4.0, steps=25)))
    mean = {name: sum(x) / len(x) for name, x in (("cold", cold), ("warm", warm), ("draw", draw))}
    spans_read = sum(len(list(spans(prompt, model.gate.longest))) for prompt in prompts) / len(prompts)
    return {
        **{f"{name}_seconds": value for name, value in mean.items()},
        "cold_share": mean["cold"] / mean["draw"],
        "warm_share": mean["warm"] / mean["draw"],
        "prompts": len(prompts),
        "spans_per_prompt": spans_read,
    }


def on_concept(base: Generator, aim: Target, search: bool) -> dict[str, Any]:
    """Attacks on the gate, bit identity and cost for one target."""
    said = (*aim.concept.prompts, *aim.synonyms)
    told, bare = gated(base, aim, said), gated(base, aim, aim.concept.prompts)
    pairs = held_out(said, aim.anchor, 30, "bits")
    found = {
        "bit_identity": bits(told, pairs, 2),
        "overhead": overhead(base, told, [prompt for prompt, _ in pairs[:TIMED]]),
        "random_suffix": suffixed(told, said, aim.anchor, 60),
        "random_suffix_synonyms_not_given": suffixed(bare, aim.synonyms, aim.anchor, 20) if aim.synonyms else None,
        # a guidance-distilled sampler reads no negative prompt, and refuses one
        "negative_flip": None if distilled(base) else flipped(told, said, aim.anchor, 60),
        "misspelt": misspelt(told, aim.concept.phrase, aim.anchor, 60),
        "vocabulary_search": vocabulary(told, base, aim, 20) if search else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def distilled(base: Any) -> bool:
    """Whether guidance is an input of the network."""
    return bool(getattr(base, "distilled", False))


def entry(held: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What was counted of this model and suite under the same settings, brought up to date; empty rows otherwise."""
    same_run = all(held.get(key) == facts[key] for key in ("suite_digest", "settings", "delta"))
    return facts | {key: held[key] if same_run else {} for key in ("targets", "concepts")}


def main() -> None:
    """Count, print, write results/gate.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="objects")
    parser.add_argument("--concept", help="the target that attacks and timing are run for; default: the first one")
    parser.add_argument("--targets", nargs="*", default=[], help="default: all of the suite")
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--search", action="store_true", help="also try every word of the tokenizer (T1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite(args.suite)
    if styles := [target.concept.name for target in suite.targets if target.concept.kind == "style"]:
        raise SystemExit(f"suite {args.suite} erases styles ({', '.join(styles)}); the frames counted on name things")
    base = load(args.model)
    facts: dict[str, Any] = {"model": args.model, "suite": args.suite, "suite_digest": suite.digest, "delta": DELTA}
    facts |= {"settings": asdict(replace(PromptGate(), others=())) | {"others": []}}
    facts |= {"seeds": "Random('gate <row>')", "frames": 2100}
    facts |= {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    facts["load_average"] = os.getloadavg()[0]
    file, name = RESULTS / "gate.json", f"{Path(args.model).name}, {args.suite}"
    every = json.loads(file.read_text()) if file.exists() else {}
    found = every[name] = entry(every.get(name, {}), facts)
    others = args.targets or [target.concept.name for target in suite.targets]
    for concept in dict.fromkeys([args.concept or others[0], *others]):
        if concept not in found["targets"]:
            found["targets"][concept] = on_target(base, suite.target(concept), suite)
        print(concept, json.dumps(found["targets"][concept]), flush=True)
        if concept == (args.concept or others[0]):
            found["concepts"][concept] = on_concept(base, suite.target(concept), args.search)
            print(json.dumps(found["concepts"][concept]), flush=True)
        file.write_text(json.dumps(every, indent=1) + "\n")  # a killed run keeps whole targets


if __name__ == "__main__":
    main()
