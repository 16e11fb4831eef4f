"""Leakage: an artifact's pictures of a concept against those of its anchor → a leakage certificate."""

from dataclasses import dataclass
from pathlib import Path

from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.measure import Detector
from expunge.core.records import OperatingPoint
from expunge.leakage.attack import about, attack_rows
from expunge.leakage.lower import CLIP
from expunge.leakage.record import DELTA, AttackRow, Design, LeakageCertificate, PathRow, Scope, Structural
from expunge.leakage.twins import Level, Split, Twin, check_frames, digest, frames, twins
from expunge.models.load import load as load_model
from expunge.stages import _leakage, _outcomes, artifact
from expunge.stages._arms import ARMS, Pictures, Plan
from expunge.stages._gate import structural
from expunge.stages._looks import Measured, Observers, measured
from expunge.stages._path import path_row, walkable
from expunge.stages._provenance import model_fingerprint
from expunge.stages.score import load_detector
from expunge.suites.load import Suite, Target


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be certified: all that is fixed before a picture is drawn."""

    concept: str
    level: Level
    suite: Suite
    """Gives synonyms, sampler, anchor, detectors, and the looks of the default sentences."""
    anchor: str = ""
    prompts: tuple[str, ...] = ()
    """Sentences with one {}; the default ones of `leakage.twins.frames` if empty."""
    detectors: tuple[str, ...] = ()
    path: bool = False
    """Whether the path-KL bound is asked for."""
    noise_floor: float = 0.0
    """Above 0: draw by the ancestral sampler, its steps noisy by at least this; 0: by the model's own."""
    seed: int = 0
    batch: int = 8


@dataclass(frozen=True)
class Subject:
    """One question with its artifact, its twin prompts and its observers, the base model among them."""

    question: Question
    made: artifact.Artifact
    target: Target
    erased: str
    """The artifact's own name for the concept: a suite may give it another."""
    anchor: str
    pairs: tuple[Twin, ...]
    observers: Observers

    @property
    def split(self) -> Split:
        """Which pairs train, calibrate and test."""
        return Split.of(len(self.pairs), self.question.seed)


def leakage(source: Path, question: Question, run: Run) -> LeakageCertificate:
    """Draw, look, check the controls, and write RUN/leakage/<concept>/certificate.json.

    Rows about attacks come from the run's own attacks/, structural ones from the artifact's gate, if it has one.
    Finished pictures are kept: a killed call continues. Raises InputError, before anything is drawn, for a concept the
    artifact did not erase, no anchor, too few prompts, a prompt the model cannot read, a detector that is not
    calibrated for the concept, or results of attacks on another artifact.
    """
    subject = _subject(source, question, run)
    base, plan, place = subject.observers.base, _plan(subject), subject.made.folder.parent
    attacks = about(_outcomes.read(place), subject.erased, plan.patch_sha256, plan.model_sha256)
    erased = subject.made.on(base)
    gate = structural(erased, subject.pairs, plan, run)
    folder = _leakage.place(place, question.concept)
    pictures = Pictures.open(folder / "pictures", plan, subject.pairs)
    pictures.draw(erased, base, run)
    looks = {arm: subject.observers.look(pictures, arm, run) for arm in ARMS}
    weakened = subject.observers.weakened(pictures, run)
    seen = measured(looks, weakened, subject.observers, subject.split, question.seed, run)
    path = _path(subject, erased, run)
    found = _certificate(subject, seen, gate, path, attack_rows(attacks, DELTA))
    _leakage.write(folder, found)
    return found


def _certificate(
    subject: Subject, seen: Measured, gate: Structural, path: PathRow | None, attacks: tuple[AttackRow, ...]
) -> LeakageCertificate:
    return LeakageCertificate(
        scope=_scope(subject),
        design=_design(subject),
        lower=seen.lower,
        attribution=seen.attribution,
        detector=seen.detector,
        family=seen.family,
        structural=gate,
        path=path,
        attack=attacks,
        controls=seen.controls,
    )


def _subject(source: Path, question: Question, run: Run) -> Subject:
    made, suite = artifact.load(source), question.suite
    erased = {
        suite.named(each): (each, anchor) for each, anchor in zip(made.card.target, made.card.anchor, strict=True)
    }
    if question.concept not in erased:
        raise InputError(f"{source} erased {', '.join(erased)}, not {question.concept!r}; choose among what it erased")
    target, (own, sent) = suite.target(question.concept), erased[question.concept]
    anchor = question.anchor or (sent.phrase if sent else "") or target.anchor
    if not anchor:
        raise InputError(f"{question.concept!r} has no anchor to compare with; name one with --anchor")
    pairs = twins(_lines(question), (target.concept.phrase, *target.synonyms), anchor, question.level, question.seed)
    judges = {name: load_detector(name) for name in question.detectors or suite.detectors}
    points = {name: _point(name, judge, target.concept) for name, judge in judges.items()}
    base = _sampler(load_model(made.card.base.name, device=run.device, dtype=made.card.run.dtype), question)
    for twin in pairs:
        base.check_prompt(twin.concept)
        base.check_prompt(twin.anchor)
    return Subject(question, made, target, own.name, anchor, pairs, Observers(base, judges, points, target.concept))


def _sampler(base: Generator, question: Question) -> Generator:
    """Give the base the sampler that is asked for."""
    if question.noise_floor:
        return walkable(base).ancestral(question.noise_floor)
    if question.path:
        sampler = type(getattr(base, "scheduler", None)).__name__
        raise InputError(
            f"path-KL needs a stochastic sampler with noise in every step, the last one too; {sampler} has none there: "
            "draw with --noise-floor"
        )
    return base


def _path(subject: Subject, erased: Generator, run: Run) -> PathRow | None:
    """Walk the pairs of the test split."""
    if not subject.question.path:
        return None
    pairs, base = [subject.pairs[place] for place in subject.split.test], walkable(subject.observers.base)
    return path_row(walkable(erased), base, pairs, _plan(subject), run)


def _lines(question: Question) -> tuple[str, ...]:
    if question.prompts:
        return check_frames(question.prompts)
    cases = question.suite.cases
    styles = dict.fromkeys(case.style for case in cases if case.style)
    return frames(list(styles), list(dict.fromkeys(case.background for case in cases if case.background)))


def _point(name: str, judge: Detector, concept: Concept) -> OperatingPoint:
    point = judge.operating_point(concept)
    if point is None:
        raise InputError(f"detector {name!r} is not calibrated for {concept.name!r}; choose another with --detector")
    return point


def _plan(subject: Subject) -> Plan:
    sampler = subject.question.suite.sampler
    return Plan(
        model_sha256=model_fingerprint(subject.observers.base),
        patch_sha256=subject.made.card.patch.sha256,
        prompts_sha256=digest(subject.pairs),
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        seed=subject.question.seed,
        batch=subject.question.batch,
    )


def _scope(subject: Subject) -> Scope:
    plan = _plan(subject)
    scheduler, floor = type(getattr(subject.observers.base, "scheduler", None)).__name__, subject.question.noise_floor
    return Scope(
        model_hash=plan.model_sha256,
        patch_hash=plan.patch_sha256,
        method=subject.made.card.method,
        concept=subject.target.concept.name,
        anchor=subject.anchor,
        prompts_hash=plan.prompts_sha256,
        tier="name and synonyms" if subject.target.synonyms else "name",
        threat="prompts",
        attack="none",
        budget="none",
        sampler=f"{scheduler}, {plan.steps} steps" + (f", noise floor {floor:g}" if floor else ""),
        cfg=plan.guidance_scale,
        n_prompts=len(subject.pairs),
        images_per_prompt=1,
    )


def _design(subject: Subject) -> Design:
    split = subject.split
    return Design(
        delta=DELTA,
        level=subject.question.level,
        splits=(len(split.train), len(split.calibrate), len(split.test)),
        tau=CLIP,
        seed_policy="independent of C and of each other",
        clusters=len(subject.pairs),
    )
