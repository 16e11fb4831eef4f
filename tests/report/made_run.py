"""A finished run folder without any model: invented pictures and decisions, written by the stages' own writers."""

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from expunge.core.card import Base, Card, Contents, Provenance
from expunge.core.concept import Concept
from expunge.core.records import Case, OperatingPoint
from expunge.ops.stats import clopper_pearson
from expunge.stages import _files, sample
from expunge.stages.score import POINTS, SCORES
from expunge.stages.summarize import summarize
from expunge.suites.load import Suite, load

STYLES = ("flat", "ink", "sepia", "3d", "sticker")
NEIGHBOURS = ("banana", "watermelon", "cherries", "tomato", "red apple")
COLOURS = {
    "strawberry": "crimson",
    "banana": "gold",
    "watermelon": "seagreen",
    "cherries": "purple",
    "tomato": "tomato",
}
ARMS = ("base", "uce", "esd", "all_but_one")
DETECTORS = ("judge_cnn", "judge_vit")
Draw = Callable[[str, Case], bytes]
Decide = Callable[[str, str, Case], bool]


def write_suite(folder: Path, *, per_prompt: int = 4) -> Suite:
    """Write and load a suite of one target: five styles, two synonyms, five neighbours."""
    folder.mkdir(parents=True)
    (folder / "suite.toml").write_text(
        f"""name = "objects"
version = "1"
detectors = {json.dumps(list(DETECTORS))}
[sampler]
steps = 25
guidance_scale = 4.0
[[target]]
name = "strawberry"
kind = "object"
synonyms = ["red berry", "garden berry"]
anchor = "banana"
retain = {json.dumps(list(NEIGHBOURS))}
"""
    )
    asked = [
        ("target", "strawberry", "strawberry"),
        *(("synonym", "strawberry", s) for s in ("red berry", "garden berry")),
    ]
    asked += [("retain", name, name) for name in NEIGHBOURS]
    rows = ["case_id,target,role,concept,style,background,prompt,seed"]
    for role, concept, words in asked:
        for style in STYLES:
            for seed in range(per_prompt):
                case_id = f"strawberry/{role}/{words}/{style}/{seed}"
                prompt = f"a {style} emoji of a {words} on white"
                rows.append(f"{case_id},strawberry,{role},{concept},{style},white,{prompt},{seed}")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return load(folder)


def blob(arm: str, case: Case) -> bytes:
    """Draw a case as a coloured disc, its target as a grey square once erased."""
    image = Image.new("RGB", (64, 64), "white")
    gone = arm != "base" and case.role != "retain"
    shape = ImageDraw.Draw(image).rectangle if gone else ImageDraw.Draw(image).ellipse
    shape((10 + case.seed, 10, 54, 54), fill="grey" if gone else COLOURS.get(case.concept, "navy"))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def plausible(arm: str, detector: str, case: Case) -> bool:
    """Decide as a good eraser would be seen: the target gone but for a few, the rest there but for a few."""
    dice = int(_files.sha256(f"{arm}{case.case_id}{detector[:3]}".encode()), 16) % 100
    if case.role == "retain" or arm == "base":
        return dice >= 5
    return dice < (8 if case.role == "target" else 18)


def write_run(
    folder: Path,
    *,
    arms: Sequence[str] = ARMS,
    draw: Draw = blob,
    decide: Decide = plausible,
    calibrated: bool = True,
    per_prompt: int = 4,
) -> Path:
    """Fill a run folder as the stages leave it, from cards to summary.json; return it."""
    suite = write_suite(folder.parent / f"{folder.name}-suite", per_prompt=per_prompt)
    for arm in arms:
        _samples(folder, suite, arm, draw)
        if arm != "base":
            _artifact(folder / arm / "artifact", arm)
    _scores(folder, suite, arms, decide, calibrated)
    summarize(folder)
    return folder


def _samples(folder: Path, suite: Suite, arm: str, draw: Draw) -> None:
    identity = sample.Arm(
        arm=arm,
        suite=suite.name,
        suite_sha256=suite.digest,
        model="tiny-unet",
        model_sha256="0" * 64,
        patch_sha256=None if arm == "base" else "1" * 64,
        steps=suite.sampler.steps,
        guidance_scale=suite.sampler.guidance_scale,
        batch=8,
    )
    store = sample.Store.open(folder / "samples" / suite.name / arm, identity, suite, ["strawberry"])
    store.add(suite.cases, [draw(arm, case) for case in suite.cases])


def _scores(folder: Path, suite: Suite, arms: Sequence[str], decide: Decide, calibrated: bool) -> None:
    rows = []
    for arm in arms:
        index = {
            row["case_id"]: row for row in _files.read_lines(folder / "samples" / suite.name / arm / "index.jsonl")
        }
        for detector in DETECTORS:
            for case in suite.cases:
                asked = [("object", case.concept), ("style", case.style)][: 2 if case.role == "retain" else 1]
                for kind, concept in asked:
                    fired = decide(arm, detector, case) if kind == "object" else True
                    rows.append(
                        {
                            "suite": suite.name,
                            "arm": arm,
                            "detector": detector,
                            "case_id": case.case_id,
                            "kind": kind,
                            "concept": concept,
                            "value": 1.0 if fired else -1.0,
                            "fired": fired,
                            "image": index[case.case_id]["sha256"],
                        }
                    )
    _files.write_lines(folder / SCORES, rows)
    point = OperatingPoint(
        threshold=0.0, sensitivity=clopper_pearson(196, 200), specificity=clopper_pearson(398, 400), n=600
    )
    concepts = [("object", c) for c in ("strawberry", *NEIGHBOURS)] + [("style", s) for s in STYLES]
    entries = [
        {"kind": kind, "concept": name, "point": dataclasses.asdict(point) if calibrated else None}
        for kind, name in concepts
    ]
    _files.write_json(folder / POINTS, dict.fromkeys(DETECTORS, entries))


def _artifact(folder: Path, method: str) -> None:
    paths = [f"unet.{block}.attentions.{i}.transformer_blocks.0.attn2.to_{x}.weight"
             for block in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
             for i in range(2) for x in "kv"]  # fmt: skip
    card = Card(
        method=method,
        paper="arXiv:2303.07345",
        description=f"Invented method {method} for a page without a model.",
        config={"steps": 200, "lr": 5e-05, "group": "cross_kv"},
        given=("steps",),
        target=(Concept.of("strawberry"),),
        anchor=(Concept.of("banana") if method != "all_but_one" else None,),
        retain=tuple(Concept.of(name) for name in NEIGHBOURS),
        base=Base(name="tiny-unet", revision="", family="unet", licence="Apache-2.0", sha256="0" * 64),
        patch=Contents(
            kind="weights",
            meta={},
            sha256="1" * 64,
            tensors=len(paths),
            bytes=1_234_567,
            share=0.0412,
            layers={path: 0.002 * (n % 7 + 1) for n, path in enumerate(paths)},
        ),
        run=Provenance(
            seed=0,
            device="cpu",
            dtype="float32",
            seconds=42.0,
            peak_bytes=1,
            packages={"torch": "2.13.0"},
            source_sha256="2" * 64,
            package_sha256="4" * 64,
            commit="3" * 40,
            dirty=False,
        ),
        claims={
            "deterministic": True,
            "gradients": True,
            "reconstruction": method == "all_but_one",
            "uses_anchor": method != "esd",
        },
    )
    _files.write_bytes(folder / "card.json", card.to_json().encode())
