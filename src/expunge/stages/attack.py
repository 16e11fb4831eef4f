"""Attack: artifact × attack → attacks/<name>.json, with its controls, its budget and exact intervals."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge.core.attack import Attack
from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.harm import refuse_harm
from expunge.core.outcome import Outcome
from expunge.core.records import Case
from expunge.core.registry import find
from expunge.models.load import load as load_model
from expunge.stages import _outcomes, artifact
from expunge.stages._panel import Panel
from expunge.stages._provenance import model_fingerprint
from expunge.stages._trial import Trial
from expunge.stages.recipe import settings
from expunge.stages.score import load_detector
from expunge.suites.load import Suite, catalogue
from expunge.suites.load import load as load_suite

CASES = 10


def attack(
    source: Path,
    name: str,
    run: Run,
    *,
    options: Sequence[str] = (),
    concept: str | None = None,
    suite: str | Path | None = None,
    base: str | None = None,
    cases: int = CASES,
) -> Path:
    """Attack an artifact as its user has it, model and patch, and write attacks/<name>.json beside it; return that.

    concept: which of the erased ones, by the artifact's name or the suite's, needed where there are several; it goes by
    the suite's from there on. suite: owns prompts, seeds, sampler and detectors; by default the package's own that has
    the concept. base: where the artifact's base is, if it moved. cases: prompts, evenly over the suite's. A finished
    result of the same question is kept; of another one it is an InputError, as are unknown attacks, families and
    concepts, budgets of nothing, and another base.
    """
    if cases < 1:
        raise InputError(f"cases is {cases}; legal: 1 or more")
    cls: type[Attack] = find("attacks", name)
    attacker = cls(**settings(cls, options))
    made = artifact.load(source)
    if made.card.base.family not in cls.families:
        legal = ", ".join(sorted(cls.families))
        raise InputError(f"attack {name!r} knows {legal}; {source} is of family {made.card.base.family!r}")
    chosen = load_suite(suite) if suite is not None else _suite_of(made, concept)
    target = _target(made, concept, chosen)
    asked = distinct(chosen.cases_for(target.name), cases)
    refuse_harm(target, [case.prompt for case in asked])
    question = _question(name, attacker, made, target, chosen, len(asked), run)
    out = _outcomes.place(made.folder, name, target.name, single=len(made.card.target) == 1)
    if not _outcomes.kept(out, question):
        _outcomes.write(out, _carried_out(question, attacker, made, target, chosen, asked, base, run))
    return out


def _question(
    name: str, attacker: Attack, made: artifact.Artifact, target: Concept, suite: Suite, asked: int, run: Run
) -> dict[str, Any]:
    """What decides a result, apart from the machine."""
    return {
        "attack": name,
        "config": _outcomes.plain(dataclasses.asdict(attacker)),
        "seed": run.seed,
        "concept": target.name,
        "patch_sha256": made.card.patch.sha256,
        "suite_sha256": suite.digest,
        "asked": asked,
    }


def _carried_out(
    question: dict[str, Any],
    attacker: Attack,
    made: artifact.Artifact,
    target: Concept,
    suite: Suite,
    asked: Sequence[Case],
    base: str | None,
    run: Run,
) -> Outcome:
    detectors = {name: load_detector(name) for name in suite.detectors}
    panel = Panel(target, detectors, attacker.rule, suite.sampler.steps, suite.sampler.guidance_scale)
    run.progress(f"load {made.card.base.name}", 0, 1)
    reference = load_model(base or made.card.base.name, device=run.device, dtype=made.card.run.dtype)
    run.progress(f"load {made.card.base.name}", 1, 1)
    found = Trial(attacker, panel, reference, made.on(reference), run).carried_out(target, asked)
    return Outcome(
        **question,
        **found,
        paper=attacker.paper,
        description=(inspect.getdoc(attacker) or "").partition("\n")[0],
        access=attacker.access,
        threat=attacker.threat,
        method=made.card.method,
        base=made.card.base.name,
        base_sha256=model_fingerprint(reference),
        suite=suite.name,
        steps=panel.steps,
        guidance_scale=panel.guidance_scale,
        rule=attacker.rule,
        selector=panel.selector,
        adaptive=attacker.meets_guards or made.card.patch.kind != "guard",
    )


def distinct(cases: Sequence[Case], count: int) -> list[Case]:
    """Choose target cases of different prompts, evenly over the file: prompts are what is counted."""
    firsts = list({case.prompt: case for case in reversed(cases) if case.role == "target"}.values())[::-1]
    size = min(count, len(firsts))
    return [firsts[index * len(firsts) // size] for index in range(size)]


def _target(made: artifact.Artifact, name: str | None, suite: Suite) -> Concept:
    """Give the erased concept as the suite has it: detectors and real pictures know the suite's names alone."""
    told = [(concept, suite.named(concept)) for concept in made.card.target]
    legal = ", ".join(concept.name for concept, _ in told)
    found = [(concept, ours) for concept, ours in told if name in (None, concept.name, ours)]
    if not found:
        raise InputError(f"{made.folder} did not erase {name!r}; legal: {legal}")
    if len(found) > 1:
        raise InputError(f"{made.folder} erased {legal}; name one with --concept")
    refuse_harm(found[0][0])
    return suite.target(found[0][1]).concept


def _suite_of(made: artifact.Artifact, name: str | None) -> Suite:
    wanted = [concept for concept in made.card.target if name in (None, concept.name)] or made.card.target
    for known in map(load_suite, catalogue()):
        held = {target.concept.name for target in known.targets}
        if any(known.named(concept) in held for concept in wanted):
            return known
    said = ", ".join(repr(concept.name) for concept in wanted)
    raise InputError(f"no suite of the package has prompts for {said}; give one: --suite FOLDER")
