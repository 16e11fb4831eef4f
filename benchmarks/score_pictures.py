"""How far an arm's retained pictures lie from the base model's, on a judge's features; for benchmarks.results_score."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from expunge.metrics._features import CHUNK, left_out
from expunge.metrics.kernel_distance import kernel_distance
from expunge.stages.score import arms as drawn_arms
from expunge.stages.score import load_detector, read_image

Shown = dict[tuple[str, str], tuple[str, torch.Tensor]]
"""Run and case → prompt and picture, or what a judge makes of it."""


def arms(runs: Iterable[Path], names: Collection[str]) -> dict[str, Shown]:
    """Arm → the retained pictures of some run folders; an arm that refused a target has none of that run."""
    found: dict[str, Shown] = {}
    for run in runs:
        for header, index, place in drawn_arms(run):
            if (arm := header["identity"]["arm"]) in names:
                kept = {(str(run), row["case_id"]): row for row in index if row["role"] == "retain"}
                found.setdefault(arm, {}).update(
                    {key: (row["prompt"], read_image(place / row["file"], row["sha256"])) for key, row in kept.items()}
                )
    return found


def described(drawn: Mapping[str, Shown], detector: str) -> dict[str, Shown]:
    """The same with a judge's features, in float64, in place of the pictures; raises TypeError if it has none."""
    judge = load_detector(detector)
    found: dict[str, Shown] = {}
    for arm, shown in drawn.items():
        parts = [judge.features(part) for part in torch.stack([x for _, x in shown.values()]).split(CHUNK)]
        if any(part is None for part in parts):
            raise TypeError(f"{detector} has no features")
        rows = torch.cat(parts).double()
        found[arm] = {key: (prompt, row) for (key, (prompt, _)), row in zip(shown.items(), rows, strict=True)}
    return found


def distances(seen: Mapping[str, Shown], detector: str) -> dict[str, dict[str, Any]]:
    """Arm → kernel distance to the base's pictures of the same cases, with its jackknife interval over prompts.

    Squared MMD under the cubic kernel, as metrics/kernel_distance.py has it.
    """
    found = {}
    for arm in (arm for arm in seen if arm != "base"):
        keys = list(seen[arm])
        pair, prompts = (stacked(seen[arm], keys), stacked(seen["base"], keys)), [seen[arm][key][0] for key in keys]
        found[arm] = asdict(left_out(kernel_distance, pair, prompts, detector, floor=None))
    return found


def distances_of(pair: tuple[str, str], seen: Mapping[str, Shown]) -> list[float]:
    """The distances of two arms on the cases that both drew; [] if there are none."""
    both = [key for key in seen[pair[0]] if key in seen[pair[1]]]
    base = stacked(seen["base"], both) if both else torch.empty(0)
    return [kernel_distance(stacked(seen[arm], both), base) for arm in pair if both]


def stacked(shown: Shown, keys: Iterable[tuple[str, str]]) -> torch.Tensor:
    """Features of some cases, row by row."""
    return torch.stack([shown[key][1] for key in keys])
