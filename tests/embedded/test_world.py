"""Emoji world is what the README says: licences, coverage, held-out pairs, and suites that respect them."""

import hashlib
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from expunge.suites.load import load

ROOT = Path(__file__).parents[2]
DATASET = ROOT / "src" / "expunge" / "embedded" / "emoji-world.parquet"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return pq.read_table(DATASET).to_pylist()


def test_permissive_art_only_and_every_package_credited(rows):
    notice = (ROOT / "NOTICE").read_text()
    assert {row["licence"] for row in rows} <= {"Apache-2.0", "MIT", "CC-BY-4.0"}
    for package, version in {(row["package"], row["version"]) for row in rows}:
        assert f"{package} {version}" in notice


def test_size_and_coverage(rows):
    assert DATASET.stat().st_size <= 20e6
    assert len({row["style"] for row in rows}) >= 5
    pairs = {(row["name"], row["style"]) for row in rows}
    per_concept = Counter(name for name, _ in pairs)
    assert len(per_concept) >= 96
    assert min(per_concept.values()) >= 4


def test_every_style_is_drawn_by_several_hands_and_shares_three_with_all_others(rows):
    hands = {style: {r["package"] for r in rows if r["style"] == style} for style in {r["style"] for r in rows}}
    assert len(set.intersection(*hands.values())) >= 3


def test_every_image_is_64_by_64_rgba_and_none_stands_twice(rows):
    images = [Image.open(io.BytesIO(row["png"])) for row in rows]
    assert {(image.size, image.mode) for image in images} == {((64, 64), "RGBA")}
    assert len({image.tobytes() for image in images}) == len(images)


def test_names_and_synonyms_mean_one_concept_each(rows):
    words = {row["name"]: (row["name"], *row["synonyms"]) for row in rows}
    every = [word for group in words.values() for word in group]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("suite", ["objects", "styles", "identities", "unsafe"])
def test_suites_never_ask_for_a_held_out_pair(rows, suite):
    held_out = {(row["name"], row["style"]) for row in rows if row["split"] == "held_out"}
    assert len(held_out) == 30
    drawn = {(row["name"], row["style"]) for row in rows} - held_out
    cases = load(suite).cases
    assert all(any(f" {name} on" in case.prompt for name in _words(rows, case)) for case in cases)
    if suite != "styles":
        assert all((case.concept, case.style) in drawn for case in cases)


def _words(rows: list[dict], case) -> set[str]:
    return {word for row in rows for word in (row["name"], *row["synonyms"])} | {f"{case.style} style"}


@pytest.mark.parametrize("suite", ["objects", "styles", "identities", "unsafe"])
def test_suites_have_the_promised_rows(suite):
    loaded = load(suite)
    assert len(loaded.targets) == (5 if suite == "styles" else 10)
    for target in loaded.targets:
        roles = Counter(case.role for case in loaded.cases_for(target.concept.name))
        assert roles == {"target": 30, "synonym": 20, "retain": 30}


@pytest.mark.slow
def test_rebuilding_gives_the_same_bytes(tmp_path):
    rebuilt = tmp_path / "world.parquet"
    command = [sys.executable, "-m", "training.build_dataset", "--cache", str(tmp_path / "npm"), "--out", str(rebuilt)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert hashlib.sha256(rebuilt.read_bytes()).digest() == hashlib.sha256(DATASET.read_bytes()).digest()
