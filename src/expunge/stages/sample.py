"""Sample: artifact (or the base model) × suite → images with an index."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.records import Case
from expunge.models.load import load as load_model
from expunge.stages import _files, artifact
from expunge.stages._provenance import model_fingerprint
from expunge.suites.load import Suite
from expunge.suites.load import load as load_suite

BASE, ARM, INDEX = "base", "arm.json", "index.jsonl"


def sample(
    source: Path | None,
    suite: str | Path,
    out: Path,
    run: Run,
    *,
    model: str | None = None,
    dtype: str | None = None,
    targets: Sequence[str] = (),
    cache: Path | None = None,
    batch: int = 8,
) -> Path:
    """Draw a suite's cases into out/samples/<suite>/<arm>/ and return that folder.

    source: an artifact or run folder; None draws from the base `model`, arm "base". targets: whose cases; an artifact's
    own targets by default, all of the suite for the base. cache: folder where the base model's images are kept and
    found again. Sampler, guidance and seeds are the suite's. Finished batches are kept: a killed call continues, and
    its files are those of an uninterrupted one byte for byte, because batches are always composed alike.
    Raises InputError for an unknown suite, target or model, a target the artifact does not erase, a wrong base, or a
    folder that holds another arm's samples.
    """
    made, loaded = artifact.load(source) if source else None, load_suite(suite)
    name = model or (made.card.base.name if made else None)
    if name is None:
        raise InputError("sampling without an artifact needs the name of a base model")
    erased = [loaded.named(concept) for concept in made.card.target] if made else []
    chosen = [loaded.target(target).concept.name for target in targets or erased]
    if made and (foreign := [target for target in chosen if target not in erased]):
        # their images would count as failures to erase what nobody erased
        raise InputError(f"{source} erased {', '.join(erased)}, not {foreign[0]!r}; choose among what it erased")
    chosen = chosen or [target.concept.name for target in loaded.targets]
    precision = dtype or (made.card.run.dtype if made else "float32")
    run.progress(f"load {name}", 0, 1)
    base = load_model(name, device=run.device, dtype=precision)
    run.progress(f"load {name}", 1, 1)
    arm = Arm.of(loaded, made, base, name, batch)
    folder = out / "samples" / loaded.name / arm.arm
    drawn = made.on(base) if made else base
    shared = cache / arm.model_sha256 / f"{loaded.digest}-{batch}" if cache and not made else None
    _draw(drawn, arm, chosen, Store.open(folder, arm, loaded, chosen), shared, run)
    return folder


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What decides every image of a folder, apart from the case itself."""

    arm: str
    suite: str
    suite_sha256: str
    model: str
    model_sha256: str
    patch_sha256: str | None
    steps: int
    guidance_scale: float
    batch: int

    @classmethod
    def of(cls, suite: Suite, made: artifact.Artifact | None, base: Generator, name: str, batch: int) -> "Arm":
        """Describe the arm of an artifact, or of the base model."""
        return cls(
            arm=made.card.method if made else BASE,
            suite=suite.name,
            suite_sha256=suite.digest,
            model=name,
            model_sha256=model_fingerprint(base),
            patch_sha256=made.card.patch.sha256 if made else None,
            steps=suite.sampler.steps,
            guidance_scale=suite.sampler.guidance_scale,
            batch=batch,
        )


@dataclass(frozen=True)
class Store:
    """A folder of samples that is consistent after every write: arm.json first, images, then the index."""

    folder: Path
    suite: Suite
    done: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, arm: Arm, suite: Suite, targets: Sequence[str]) -> "Store":
        """Open or create the folder; index rows whose image is missing or altered are forgotten and drawn again."""
        asked, before = dataclasses.asdict(arm), set[str]()
        if (folder / ARM).exists():
            header = _files.read_json(folder / ARM)
            held, before = header["identity"], set(header["targets"])
            if differ := [key for key in asked if held.get(key) != asked[key]]:
                key = differ[0]
                raise InputError(
                    f"{folder} holds samples with {key} {held.get(key)!r}, not {asked[key]!r}: choose another folder"
                )
            _files.sweep(folder)
        wanted = [target for target in suite.targets if target.concept.name in before | set(targets)]
        concepts = {(c.name, c.kind): c for target in wanted for c in (target.concept, *target.retain)}
        header = {
            "identity": asked,
            "targets": [target.concept.name for target in wanted],
            "detectors": list(suite.detectors),
            "concepts": [dataclasses.asdict(concept) for concept in concepts.values()],
            "cases": sum(len(suite.cases_for(target.concept.name)) for target in wanted),
        }
        _files.write_json(folder / ARM, header)
        rows = [row for row in _files.read_lines(folder / INDEX) if _intact(folder, row)]
        return cls(folder, suite, {row["case_id"]: row for row in rows})

    def add(self, cases: Sequence[Case], images: Sequence[bytes]) -> None:
        """Write images, then the index that names them, each file atomically."""
        for case, data in zip(cases, images, strict=True):
            file = file_name(case)
            _files.write_bytes(self.folder / file, data)
            kind = self.suite.concept_of(case).kind
            row = {**dataclasses.asdict(case), "kind": kind, "file": file, "sha256": _files.sha256(data)}
            self.done[case.case_id] = row
        ordered = [self.done[case.case_id] for case in self.suite.cases if case.case_id in self.done]
        _files.write_lines(self.folder / INDEX, ordered)


def file_name(case: Case) -> str:
    """Name an image by a hash of its case id: neither name nor metadata of a PNG tells what was asked for."""
    return f"{_files.sha256(case.case_id.encode())[:16]}.png"


def png(image: Float[Tensor, "3 h w"]) -> bytes:
    """Encode an image in [0, 1] as 8-bit PNG without metadata, rounding to nearest."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _draw(model: Generator, arm: Arm, targets: Sequence[str], store: Store, shared: Path | None, run: Run) -> None:
    batches = [cases for target in targets for cases in _chunks(store.suite.cases_for(target), arm.batch)]
    total, done = sum(map(len, batches)), 0
    for cases in batches:
        if not all(case.case_id in store.done for case in cases):
            images = _cached(shared, cases)
            if images is None:
                images = _generate(model, cases, arm)
                _keep(shared, cases, images)
            store.add(cases, images)
        done += len(cases)
        run.progress(f"sample {arm.arm}", done, total)


def _generate(model: Generator, cases: Sequence[Case], arm: Arm) -> list[bytes]:
    with torch.no_grad():
        images = model.generate(
            [case.prompt for case in cases],
            seeds=[case.seed for case in cases],
            guidance_scale=arm.guidance_scale,
            steps=arm.steps,
        )
    if not bool(torch.isfinite(images).all()):
        raise InputError(f"model {model.name!r} draws images that are not finite, for example for {cases[0].prompt!r}")
    return [png(image) for image in images]


def _chunks(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    # rounding depends on how a batch is composed, so composition depends on the suite and `size` alone
    return (cases[start : start + size] for start in range(0, len(cases), size))


def _cached(shared: Path | None, cases: Sequence[Case]) -> list[bytes] | None:
    if shared is None:
        return None
    files = [shared / file_name(case) for case in cases]
    return [file.read_bytes() for file in files] if all(file.exists() for file in files) else None


def _keep(shared: Path | None, cases: Sequence[Case], images: Sequence[bytes]) -> None:
    if shared is not None:
        for case, data in zip(cases, images, strict=True):
            _files.write_bytes(shared / file_name(case), data)


def _intact(folder: Path, row: dict[str, Any]) -> bool:
    file = folder / row["file"]
    return file.is_file() and _files.sha256(file.read_bytes()) == row["sha256"]
