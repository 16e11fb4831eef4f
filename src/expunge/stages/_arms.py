"""Pictures of a leakage certificate: five arms of one draw of twin prompts, kept and found again."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.leakage.twins import Twin, draw_seed
from expunge.stages import _files
from expunge.stages.sample import png
from expunge.stages.score import read_image

ARMS = ("concept", "anchor", "again", "base-concept", "base-anchor")
"""Erased model: concept, anchor, anchor with other seeds; base model: concept, anchor."""
PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides every picture, fixed before the first is drawn."""

    model_sha256: str
    patch_sha256: str
    prompts_sha256: str
    steps: int
    guidance_scale: float
    seed: int
    batch: int


@dataclass(frozen=True)
class Pictures:
    """The folder of one certificate's pictures: a plan, and one index per arm."""

    folder: Path
    plan: Plan
    pairs: tuple[Twin, ...]

    @classmethod
    def open(cls, folder: Path, plan: Plan, pairs: tuple[Twin, ...]) -> "Pictures":
        """Open or begin a folder; raises InputError if it holds pictures of another plan."""
        asked = dataclasses.asdict(plan)
        if (folder / PLAN).exists():
            held = _files.read_json(folder / PLAN)
            if differ := [key for key in asked if held.get(key) != asked[key]]:
                key = differ[0]
                raise InputError(f"{folder} holds pictures with {key} {held.get(key)!r}, not {asked[key]!r}: remove it")
        _files.write_json(folder / PLAN, asked)
        return cls(folder, plan, pairs)

    def draw(self, erased: Generator, base: Generator, run: Run) -> None:
        """Draw what is missing. One picture per prompt, seeds independent of C; names are hashes, no metadata."""
        total, done = len(ARMS) * len(self.pairs), 0
        for arm in ARMS:
            model = base if arm.startswith("base") else erased
            known = {row["pair"]: row for row in _files.read_lines(self._index(arm)) if self._intact(row)}
            for start in range(0, len(self.pairs), self.plan.batch):
                part = self.pairs[start : start + self.plan.batch]
                if not all(twin.pair in known for twin in part):
                    known |= {row["pair"]: row for row in self._batch(model, arm, part)}
                    _files.write_lines(self._index(arm), [known[pair] for pair in sorted(known)])
                done += len(part)
                run.progress("draw", done, total)

    def read(self, arm: str, start: int, stop: int) -> Float[Tensor, "b 3 h w"]:
        """Read some pictures of an arm, in the order of the pairs; raises InputError for one missing or altered."""
        rows = _files.read_lines(self._index(arm))[start:stop]
        return torch.stack([read_image(self.folder / row["file"], row["sha256"]) for row in rows])

    def _batch(self, model: Generator, arm: str, part: tuple[Twin, ...]) -> list[dict[str, Any]]:
        texts = [twin.concept if arm.endswith("concept") else twin.anchor for twin in part]
        seeds = [draw_seed(self.plan.seed, arm, twin.pair) for twin in part]
        with torch.no_grad():
            images = model.generate(texts, seeds=seeds, guidance_scale=self.plan.guidance_scale, steps=self.plan.steps)
        if not bool(torch.isfinite(images).all()):
            raise InputError(f"model {model.name!r} draws images that are not finite, for example for {texts[0]!r}")
        return [self._keep(arm, twin, png(image)) for twin, image in zip(part, images, strict=True)]

    def _keep(self, arm: str, twin: Twin, data: bytes) -> dict[str, Any]:
        file = f"{_files.sha256(f'{arm} {twin.pair}'.encode())[:16]}.png"
        _files.write_bytes(self.folder / file, data)
        return {"pair": twin.pair, "file": file, "sha256": _files.sha256(data)}

    def _index(self, arm: str) -> Path:
        return self.folder / f"{arm}.jsonl"

    def _intact(self, row: Mapping[str, Any]) -> bool:
        file = self.folder / row["file"]
        return file.is_file() and _files.sha256(file.read_bytes()) == row["sha256"]
