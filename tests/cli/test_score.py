"""score, report and demo on the toy model with the toy suite: numbers of one run through to its page."""

import json
from pathlib import Path

import pytest

from expunge.cli.cut import cut_suite

RATES = {"target_rate", "synonym_rate", "retain_rate", "style_rate", "harmonic"}
FIELDS = {"value", "low", "high", "level", "n", "clusters", "how", "detector", "corrected_for"}
RED = ("--target", "red", "--anchor", "green", "--method", "uce", "--set", "ridge=0.001")


@pytest.mark.usefixtures("colour")
def test_score_stands_beside_the_base_and_continues(suite: Path, tmp_path: Path, expunge) -> None:
    run = tmp_path / "run"
    assert expunge("erase", "tiny-unet", *RED, "--out", run).code == 0
    first = expunge("score", run, "--suite", suite, "--json")
    assert first.code == 0
    told = json.loads(first.out)
    (part,) = told["suites"]
    assert told["run"] == str(run) and part["suite"] == "colours" and part["targets"] == ["red"]
    assert [arm["arm"] for arm in part["arms"]] == ["base", "uce"]
    for arm in part["arms"]:
        for rate in RATES:
            assert set(arm[rate]) == FIELDS == set(arm["raw"][rate])
            assert arm[rate]["low"] <= arm[rate]["value"] <= arm[rate]["high"]
    images = {file: file.stat().st_mtime_ns for file in run.rglob("*.png")}
    # the artifact's own folder means the same run, and what is there is kept
    assert expunge("score", run / "artifact", "--suite", suite, "--json").out == first.out
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.png")} == images
    shown = expunge("score", run, "--suite", suite)
    assert "base" in shown.out and "uce" in shown.out and "expunge report" in shown.out

    page = expunge("report", run, "--json")
    assert json.loads(page.out)["report"] == str(run / "report.html")
    text = (run / "report.html").read_text()
    assert "“red”, erased with uce" in text and text.count("<img") > 10
    assert expunge("report", run / "artifact").out.strip() == str(run / "report.html")


@pytest.mark.usefixtures("colour")
def test_score_of_a_bare_model_is_its_base_row(suite: Path, tmp_path: Path, expunge) -> None:
    out = tmp_path / "out"
    done = expunge("score", "tiny-unet", "--suite", suite, "--target", "blue", "--out", out, "--json")
    (part,) = json.loads(done.out)["suites"]
    assert [arm["arm"] for arm in part["arms"]] == ["base"] and part["targets"] == ["blue"]
    assert (out / "summary.json").is_file()
    wrong = expunge("score", "tiny-unet", "--suite", suite, "--target", "cat", "--out", out).complaint()
    assert "'cat'" in wrong and "red, blue" in wrong


@pytest.mark.usefixtures("colour")
def test_wrong_places_are_refused(suite: Path, tmp_path: Path, expunge) -> None:
    run = tmp_path / "run"
    assert expunge("erase", "tiny-unet", "--target", "cat", "--method", "uce", "--out", run).code == 0
    assert "no target 'cat'" in expunge("score", run, "--suite", suite).complaint()
    assert "--out" in expunge("score", run, "--suite", suite, "--out", tmp_path / "other").complaint()
    assert "nope" in expunge("score", run, "--suite", "nope").complaint()
    assert not (run / "samples").exists()


@pytest.mark.usefixtures("colour")
def test_the_demo_makes_one_page_of_several_methods_and_continues(suite: Path, tmp_path: Path, expunge) -> None:
    out = tmp_path / "demo"
    words = ("demo", "--model", "tiny-unet", "--suite", suite, "--method", "uce", "--method", "esd", "--cases", 12)
    short = ("--target", "red", "--set", "esd.steps=2", "--set", "esd.pool=4", "--set", "esd.walk=4", "--out", out)
    done = expunge(*words, *short, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["report"] == str(out / "report.html")
    (part,) = told["suites"]
    assert [arm["arm"] for arm in part["arms"]] == ["base", "esd", "uce"]
    text = (out / "report.html").read_text()
    assert "erased two ways" in text
    card = json.loads((out / "esd" / "artifact" / "card.json").read_text())
    assert card["config"]["steps"] == 2 and card["given"] == ["pool", "steps", "walk"]
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    again = expunge(*words, *short)
    assert again.code == 0 and again.out.splitlines()[-1] == str(out / "report.html")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert "name one of" in expunge("generate", out, "--prompt", "red", "--out", tmp_path / "images").complaint()


@pytest.mark.usefixtures("colour")
def test_what_nobody_erased_is_not_counted_as_left(suite: Path, tmp_path: Path, expunge) -> None:
    assert expunge("erase", "tiny-unet", *RED, "--out", tmp_path / "red").code == 0
    assert "not 'blue'" in expunge("score", tmp_path / "red", "--suite", suite, "--target", "blue").complaint()
    assert not (tmp_path / "red" / "samples").exists()
    # of two artifacts side by side each is asked about its own target
    words = ("erase", "tiny-unet", "--target", "blue", "--anchor", "green", "--method", "esd", "--set", "steps=1")
    assert expunge(*words, "--set", "pool=2", "--set", "walk=2", "--out", tmp_path / "blue").code == 0
    told = json.loads(expunge("score", tmp_path, "--suite", suite, "--json").out)
    seen = {(arm["arm"], tuple(part["targets"])) for part in told["suites"] for arm in part["arms"]}
    assert seen == {("base", ("red",)), ("uce", ("red",)), ("base", ("blue",)), ("esd", ("blue",))}


@pytest.mark.usefixtures("colour")
def test_an_unknown_detector_is_refused_before_anything_is_drawn(suite: Path, tmp_path: Path, expunge) -> None:
    words = ("score", "tiny-unet", "--suite", suite, "--detector", "judge", "--out", tmp_path / "out")
    assert "unknown detector 'judge'" in expunge(*words).complaint()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("colour")
def test_a_rate_without_cases_is_null(suite: Path, tmp_path: Path, expunge) -> None:
    cases = suite / "cases.csv"
    cases.write_text("".join(line for line in cases.read_text().splitlines(True) if ",synonym," not in line))
    words = ("score", "tiny-unet", "--suite", suite, "--target", "blue", "--out", tmp_path / "out", "--json")
    (arm,) = json.loads(expunge(*words).out)["suites"][0]["arms"]
    assert set(arm) == {*RATES, "arm", "detector", "raw"}
    assert arm["synonym_rate"] is None and arm["harmonic"] is None and arm["target_rate"] is not None


def test_a_demo_refused_leaves_the_suite_that_is_there(suite: Path, tmp_path: Path, expunge) -> None:
    out = tmp_path / "demo"
    words = ("demo", "--model", "tiny-unet", "--suite", suite, "--method", "uce", "--out", out)
    assert "ridg" in expunge(*words, "--set", "uce.ridg=1").complaint()
    assert not out.exists()
    folder, _ = cut_suite(str(suite), "red", 12, out / "suite")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "another suite" in expunge(*words, "--target", "blue", "--cases", 12).complaint()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in out.iterdir()] == ["suite"]
