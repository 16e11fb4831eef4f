"""The targets of a suite in sentences that the suite does not use, written as a suite of its own.

Suites have no role for paraphrases: their prompts are one template. Here the frames of leakage/twins.py take its place,
that template left out; no method's own templates are among them. Names stay, sentences change, so what is counted is
whether an erasure holds in another sentence about the same word. Drawn by lot from the suite's digest, once for all.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.validation import GROUNDS, STYLES
from expunge.core.concept import Concept
from expunge.leakage.twins import frames
from expunge.stages import _files
from expunge.suites.load import COLUMNS, Suite, Target

EACH = 10
THINGS = ("dog", "car", "pizza", "violin", "umbrella")
"""What pictures in a style are of."""


def written(suite: Suite, home: Path) -> Path:
    """Write the paraphrases of a suite and return their folder: EACH sentences a target, as many about neighbours."""
    folder = home / f"{Path(suite.name).name}-paraphrases"
    dice, rows = random.Random(f"paraphrases {suite.digest}"), [",".join(COLUMNS)]
    for target in suite.targets:
        rows += list(_rows(target, dice))
    _files.write_bytes(folder / "suite.toml", _header(suite, folder.name).encode())
    _files.write_bytes(folder / "cases.csv", ("\n".join(rows) + "\n").encode())
    return folder


def sentences(concept: Concept, n: int, dice: random.Random) -> list[str]:
    """Draw n different sentences about a concept, none of them in the suites' template."""
    styles = (concept.name,) if concept.kind == "style" else STYLES
    words = THINGS if concept.kind == "style" else (concept.phrase,)
    plain = {f"a {style} picture of a {{}} on a {ground} background" for style in styles for ground in GROUNDS}
    held_out = [frame for frame in frames(styles, GROUNDS) if frame not in plain]
    return dice.sample([frame.replace("{}", word) for frame in held_out for word in words], n)


def _rows(target: Target, dice: random.Random) -> Iterator[str]:
    name, own = target.concept.name, target.concept
    asked = [("target", own, sentence) for sentence in sentences(own, EACH, dice)]
    for place in range(EACH):
        other = target.retain[place % len(target.retain)]
        asked.append(("retain", other, sentences(other, 1, dice)[0]))
    for place, (role, concept, prompt) in enumerate(asked):
        seed = dice.randrange(10**6)
        yield f'"{name}-{role}-{place}","{name}",{role},"{concept.name}",,,"{prompt}",{seed}'


def _header(suite: Suite, name: str) -> str:
    lines = [f"name = {json.dumps(name)}", f"version = {json.dumps(suite.version)}"]
    lines += [f"detectors = {json.dumps(list(suite.detectors))}", "[sampler]", f"steps = {suite.sampler.steps}"]
    lines.append(f"guidance_scale = {suite.sampler.guidance_scale}")
    for target in suite.targets:
        lines += ["[[target]]", *_facts(target)]
    return "\n".join(lines) + "\n"


def _facts(target: Target) -> Sequence[str]:
    return (
        f"name = {json.dumps(target.concept.name)}",
        f"kind = {json.dumps(target.concept.kind)}",
        f"prompts = {json.dumps(list(target.concept.prompts))}",
        f"anchor = {json.dumps(target.anchor)}",
        f"retain = {json.dumps([concept.name for concept in target.retain])}",
    )
