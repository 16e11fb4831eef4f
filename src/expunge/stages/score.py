"""Score: samples × detectors → one row per image and question."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from expunge.core.codec import from_data
from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.measure import Detector
from expunge.core.records import OperatingPoint, Score
from expunge.core.registry import find
from expunge.stages import _files
from expunge.stages.sample import ARM, INDEX

SCORES, POINTS = "scores.jsonl", "operating_points.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One detector asked about one concept in one image."""

    suite: str
    arm: str
    detector: str
    concept: Concept
    case_id: str
    image: str
    """SHA-256 of the image's file."""
    file: Path

    def answered(self, row: Row | None) -> bool:
        """Tell whether a stored row is about this very image."""
        return row is not None and row["image"] == self.image

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a row unique."""
        return (self.suite, self.arm, self.detector, self.case_id, self.concept.kind, self.concept.name)


def score(run_folder: Path, run: Run, *, detectors: Sequence[str] = (), batch: int = 64) -> Path:
    """Ask detectors about every image below run_folder/samples and write scores.jsonl; return its path.

    Each image is asked for its case's concept, and retained neighbours also for the style their prompt names (where it
    names one). detectors: names of the catalogue, the suites' own by default. Rows about unchanged images are kept,
    also those of detectors not asked now, unless they are incomplete: a summary speaks about whole arms only.
    The detectors' operating points for these concepts go to operating_points.json.
    Raises InputError for an unknown detector, no or incomplete samples, an image that is not the one in the index.
    """
    questions = list(_questions(run_folder, detectors))
    loaded = _loaded(list(dict.fromkeys(question.detector for question in questions)), run)
    known = {_key(row): row for row in _files.read_lines(run_folder / SCORES)}
    before = _files.read_json(run_folder / POINTS) if known and (run_folder / POINTS).exists() else {}
    others = _kept(run_folder, known, questions, {*loaded, *before})
    every = [*questions, *others]
    points = {question.detector: before.get(question.detector) for question in others}
    points |= {name: _points(detector, every, name) for name, detector in loaded.items()}
    groups = _grouped([question for question in questions if not question.answered(known.get(question.key))])
    total, done = len(questions), len(questions) - sum(map(len, groups.values()))
    run.progress("score", done, total)
    for (name, concept), group in groups.items():
        detector = loaded[name]
        threshold = _threshold(detector.operating_point(concept))
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            known |= {_key(row): row for row in _rows(detector, concept, threshold, part)}
            done += len(part)
            run.progress("score", done, total)
        _write(run_folder, known, every)
    _write(run_folder, known, every)
    _files.write_json(run_folder / POINTS, points)
    return run_folder / SCORES


def _loaded(names: Sequence[str], run: Run) -> dict[str, Detector]:
    found = {}
    for done, name in enumerate(names):
        run.progress("load detectors", done, len(names))
        found[name] = load_detector(name)
    run.progress("load detectors", len(names), len(names))
    return found


def check_detectors(names: Sequence[str]) -> None:
    """Refuse names that are not in the catalogue, without loading any weights; raises InputError."""
    for name in names:
        find("detectors", name)


def load_detector(name: str) -> Detector:
    """Build a detector of the catalogue; raises InputError for an unknown name."""
    detector: Detector = find("detectors", name)()
    return detector


def arms(run_folder: Path) -> list[tuple[Mapping[str, Any], list[Row], Path]]:
    """Return (header, index, folder) of every complete arm below samples/, base first.

    Raises InputError if there is none or one is incomplete.
    """
    folders = sorted(path.parent for path in (run_folder / "samples").glob(f"*/*/{ARM}"))
    if not folders:
        raise InputError(f"no samples in {run_folder}: expected samples/<suite>/<arm>/{ARM}")
    found = [(_files.read_json(folder / ARM), _files.read_lines(folder / INDEX), folder) for folder in folders]
    for header, rows, folder in found:
        if len(rows) != header["cases"]:
            raise InputError(f"{folder} holds {len(rows)} of {header['cases']} images; run the sampling again to go on")
    return sorted(found, key=lambda arm: (arm[0]["identity"]["suite"], arm[0]["identity"]["arm"] != "base"))


def read_image(file: Path, expected: str) -> Float[Tensor, "3 h w"]:
    """Read a PNG as values in [0, 1]; raises InputError if it is not the file the index names."""
    if not file.is_file() or _files.sha256(file.read_bytes()) != expected:
        raise InputError(f"{file} is missing or is not the image its index names; run the sampling again")
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise InputError(f"{file} is not an image") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _questions(run_folder: Path, detectors: Sequence[str]) -> Iterator[Question]:
    for header, rows, folder in arms(run_folder):
        identity = header["identity"]
        concepts = {(c["name"], c["kind"]): from_data(Concept, c) for c in header["concepts"]}
        for detector in tuple(detectors) or tuple(header["detectors"]):
            for row in rows:
                for concept in _asked(row, concepts):
                    yield Question(
                        identity["suite"], identity["arm"], detector, concept, row["case_id"], row["sha256"],
                        folder / row["file"],
                    )  # fmt: skip


def _kept(
    run_folder: Path, known: Mapping[tuple[str, ...], Row], asked: Sequence[Question], calibrated: set[str]
) -> list[Question]:
    """Return the questions that detectors outside `asked` answered before, where they answered a whole suite."""
    stored = tuple(dict.fromkeys(row["detector"] for row in known.values() if row["detector"] in calibrated))
    new = {(question.suite, question.detector) for question in asked}
    groups: dict[tuple[str, str], list[Question]] = {}
    for question in _questions(run_folder, stored) if stored else ():
        if (question.suite, question.detector) not in new:
            groups.setdefault((question.suite, question.detector), []).append(question)
    whole = [group for group in groups.values() if all(entry.answered(known.get(entry.key)) for entry in group)]
    return [question for group in whole for question in group]


def _asked(row: Row, concepts: Mapping[tuple[str, str], Concept]) -> list[Concept]:
    main = concepts[row["concept"], row["kind"]]
    style = Concept(name=row["style"], kind="style", prompts=(row["style"],)) if row["style"] else None
    with_style = row["role"] == "retain" and style is not None and (style.name, style.kind) != (main.name, main.kind)
    return [main, style] if with_style and style is not None else [main]


def _grouped(questions: Sequence[Question]) -> dict[tuple[str, Concept], list[Question]]:
    groups: dict[tuple[str, Concept], list[Question]] = {}
    for question in questions:
        groups.setdefault((question.detector, question.concept), []).append(question)
    return groups


def _rows(detector: Detector, concept: Concept, threshold: float, questions: Sequence[Question]) -> Iterator[Row]:
    # on the CPU, where detectors live: they are small, and a verdict must not depend on the device
    images = torch.stack([read_image(question.file, question.image) for question in questions])
    with torch.no_grad():
        values = detector.score(images, concept)
    fired = (values >= threshold).tolist()
    for question, value, hit in zip(questions, values.tolist(), fired, strict=True):
        record = Score(
            case_id=question.case_id,
            arm=question.arm,
            detector=question.detector,
            concept=concept.name,
            value=value,
            fired=hit,
        )
        yield {**dataclasses.asdict(record), "suite": question.suite, "kind": concept.kind, "image": question.image}


def _threshold(point: OperatingPoint | None) -> float:
    # scores are margins: an uncalibrated detector decides at 0, as core.measure says
    return point.threshold if point else 0.0


def _points(detector: Detector, questions: Sequence[Question], name: str) -> list[Row]:
    concepts = dict.fromkeys(question.concept for question in questions if question.detector == name)
    found = ((concept, detector.operating_point(concept)) for concept in concepts)
    return [
        {"concept": concept.name, "kind": concept.kind, "point": dataclasses.asdict(point) if point else None}
        for concept, point in found
    ]


def _write(run_folder: Path, known: Mapping[tuple[str, ...], Row], questions: Sequence[Question]) -> None:
    # in the order of the questions; rows whose image is gone, or that nobody asks for any more, are dropped
    rows = [known[question.key] for question in questions if question.answered(known.get(question.key))]
    _files.write_lines(run_folder / SCORES, rows)


def _key(row: Row) -> tuple[str, ...]:
    return (row["suite"], row["arm"], row["detector"], row["case_id"], row["kind"], row["concept"])
