"""SCORE beside its rivals: refusals are results, parts say what they are part of, counts are those of the files."""

import copy
import json
import re
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import effect, paraphrases, results_score, score_page, score_pictures, score_rates
from benchmarks.validation import AIMS

from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.core.measure import Detector
from expunge.core.outcome import Budget, Outcome, Point, Tally
from expunge.core.records import OperatingPoint
from expunge.core.registry import find
from expunge.ops.stats import clopper_pearson
from expunge.stages import _files
from expunge.suites.load import catalogue, load

SUITE = """
name = "reds"
version = "1"
detectors = ["lit", "lit_too"]
[sampler]
steps = 1
guidance_scale = 3.0
[[target]]
name = "red"
kind = "object"
synonyms = ["crimson"]
anchor = "dog"
retain = ["blue", "green"]
[[target]]
name = "bird"
kind = "object"
anchor = "dog"
retain = ["blue", "green"]
"""


class Lit(Detector):
    """Sees everything in every picture, the surer the brighter it is."""

    def score(self, images: torch.Tensor, concept: Concept) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def operating_point(self, concept: Concept) -> OperatingPoint | None:
        return None

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(3).flatten(1)


def written(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "suite.toml").write_text(SUITE)
    rows = ["case_id,target,role,concept,style,background,prompt,seed", "r-s,red,synonym,red,,,a crimson car,3"]
    for name in ("red", "bird"):
        rows += [f"{name}-{k},{name},target,{name},,,a {name} thing {k},{k}" for k in range(2)]
        rows += [
            f"{name}-{other}-{k},{name},retain,{other},,,a {other} thing {k},{k}"
            for other in ("blue", "green")
            for k in range(2)
        ]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    """One target of the toy suite, run: uce works, esd leaves what reads prompts alone, project refuses."""
    home = tmp_path_factory.mktemp("score")
    args = Namespace(
        model="tiny-unet",
        suite=written(home / "reds"),
        methods=["uce", "esd", "project"],
        attacks=["kv_inversion", "negative_flip", "random_suffix"],
        targets=["red"],
        seeds=[0],
        cases=2,
        set=[
            "esd.steps=1",
            "esd.batch=1",
            "esd.pool=1",
            "esd.walk=2",
            "project.min_share=0.999",
            "random_suffix.tries=2",
        ],
        out=home / "tiny-unet" / "reds",
    )
    with pytest.MonkeyPatch.context() as patch:
        see(patch)
        results_score.one(("red", 0), args)
    return args


def see(patch: pytest.MonkeyPatch) -> None:
    def found(package: str, name: str) -> type:
        return Lit if package == "detectors" and name in ("lit", "lit_too") else find(package, name)

    patch.setattr("expunge.stages.score.find", found)


@pytest.fixture
def cell(ran: Namespace, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The toy's cell, with uce as the method that must win."""
    see(monkeypatch)
    for module in (results_score, score_page):
        monkeypatch.setattr(module, "OURS", "uce")
    return json.loads(json.dumps(results_score.cell(ran)))


def test_refusals_of_methods_and_of_attacks_are_kept_with_their_reason(ran: Namespace) -> None:
    folder = ran.out / "seed-0" / "red"
    assert "red" in results_score.refusal(folder, "project")
    assert not (folder / "project").exists()
    assert (folder / "uce" / "attacks" / "kv_inversion.json").exists()
    assert not (folder / "uce" / "attacks" / "kv_inversion.refused").exists()
    assert "nothing to invert" in results_score.refusal(folder / "esd" / "attacks", "kv_inversion")
    assert not (folder / "esd" / "attacks" / "kv_inversion.json").exists()
    won = results_score.attacked("esd", ran)
    assert won["kv_inversion"]["targets"] == 0 and "nothing" in won["kv_inversion"]["refused"]["red"]
    assert won["negative_flip"]["attack"]["n"] == 2 and won["negative_flip"]["refused"] == {}
    assert won["random_suffix"]["config"]["tries"] == 2, "--set reaches attacks"


def test_what_is_in_the_way_is_no_refusal(ran: Namespace) -> None:
    """Results of another question end the run: a refusal must be the method's or the attack's own."""
    folder = ran.out / "seed-0" / "red"
    with pytest.raises(InputError, match="ridge"):
        results_score.attempted(
            folder / "uce", "kv_inversion", Namespace(**{**vars(ran), "set": ["kv_inversion.ridge=1"]})
        )
    with pytest.raises(InputError, match="finished artifact"):
        effect.erased("red", "uce", results_score.seeded(Namespace(**{**vars(ran), "set": ["uce.ridge=7"]}), 0))
    assert not list(folder.glob("uce.refused")) and not list((folder / "uce" / "attacks").glob("*.refused"))


def test_a_flip_is_refused_by_a_distilled_model_and_nothing_else_is_lost(
    ran: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch)
    said = "'tiny' is guidance-distilled and has no unconditional pass for a negative prompt"

    def refusing(*_: Any, **__: Any) -> None:
        raise InputError(said)

    monkeypatch.setattr(results_score, "attack", refusing)
    (tmp_path / "uce").mkdir()
    results_score.attempted(tmp_path / "uce", "negative_flip", ran)
    assert results_score.refusal(tmp_path / "uce" / "attacks", "negative_flip") == said
    monkeypatch.setattr(results_score, "attack", lambda *_, **__: None)
    results_score.attempted(tmp_path / "uce", "negative_flip", ran)
    assert results_score.refusal(tmp_path / "uce" / "attacks", "negative_flip") == "", "it applies now"

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(results_score, "attack", broken)
    with pytest.raises(ValueError, match="a bug"):
        results_score.attempted(tmp_path / "uce", "negative_flip", ran)


def test_a_second_run_draws_and_erases_nothing_again(ran: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in ran.out.rglob("*.png")}
    cards = {path: path.read_bytes() for path in ran.out.rglob("card.json")}
    assert len(before) > 30 and len(cards) == 2
    results_score.one(("red", 0), ran)
    assert {path: path.stat().st_mtime_ns for path in ran.out.rglob("*.png")} == before
    assert {path: path.read_bytes() for path in ran.out.rglob("card.json")} == cards


def test_a_cell_counts_what_was_asked_and_names_what_was_refused(cell: dict[str, Any]) -> None:
    assert set(cell["rates"]) == set(cell["distance"]) == {"lit", "lit_too"}
    assert list(cell["rates"]["lit"]) == ["base", "esd", "uce"] and set(cell["refused"]) == {"project"}
    assert cell["seconds"].keys() == cell["peak_bytes"].keys() == {"uce", "esd"}
    mine = cell["rates"]["lit"]["uce"]
    assert (mine["target_rate"]["n"], mine["synonym_rate"]["n"], mine["retain_rate"]["n"]) == (2, 1, 4)
    assert mine["paraphrase_rate"]["n"] == paraphrases.EACH
    # everything is seen everywhere: nothing is erased, so the score is nought
    assert mine["target_rate"]["value"] == 1 and mine["harmonic"]["value"] == 0
    assert 0.5 < mine["confidence"]["value"] < 0.75, "1 / (1 + e^-brightness)"
    assert cell["against"]["lit"].keys() == {"esd"} and cell["against"]["lit"]["esd"]["runs"] == 1
    ours, theirs = cell["against"]["lit"]["esd"]["distance"]
    assert ours == pytest.approx(cell["distance"]["lit"]["uce"]["value"]) and ours != theirs
    assert cell["asked"]["whole"]["targets"] == 2


def test_the_page_of_a_part_says_what_it_is_part_of(cell: dict[str, Any], ran: Namespace) -> None:
    text = score_page.page({f"tiny-unet, {ran.suite}": cell}, ["tiny-unet"], [str(ran.suite), "objects"])
    assert "1 of 2 cells were run, 0 of them whole" in text and "Not run: tiny-unet, objects." in text
    assert "Part of a cell: 1 of 2 targets, 1 of 3 seeds, 3 of 6 methods, 3 of 5 attacks, 2 of 10 prompts" in text
    assert "Bars of a part decide nothing." in text and "Set against the defaults: esd.batch=1" in text
    assert "| project | refused |" in text and "| esd, kv_inversion | refused |" in text
    assert "refused by kv_inversion against esd (red): attack 'kv_inversion' has nothing to invert" in text
    assert "refused by project (red, seed 0):" in text
    assert "In both: none." in text and "an equal budget of tuning is not claimed" in text


def test_a_whole_cell_and_a_broken_split_are_told_too(cell: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    held = cell["asked"]
    held["whole"] = {"targets": 1, "seeds": 1, "methods": 3, "attacks": 3, "cases": 2}
    assert (
        score_page.missing(cell) == []
        and "1 of 1 cells were run, 1 of them whole" in score_page.part({"m, s": cell}, ["m, s"])[0]
    )
    assert not set(AIMS) & {target.concept.name for name in catalogue() for target in load(name).targets}
    monkeypatch.setattr(score_page, "AIMS", {"strawberry": ()})
    assert any("In both: strawberry." in line for line in score_page.split({"emoji-unet, objects": cell}))


def test_bars_hold_where_ours_is_better_and_fall_where_it_is_not(cell: dict[str, Any]) -> None:
    better = {"runs": 1, "harmonic": [0.9, 0.6], "confidence": [0.9, 0.8], "distance": [0.1, 0.2]}
    cell["against"] = {"lit": {"esd": better, "project": {"runs": 0}}}
    cell["attacks"]["uce"] = {
        "kv_inversion": {"asr": {"high": 0.04}, "refused": {}},
        "negative_flip": {"refused": {"red": "why"}},
    }
    cell["rates"]["lit"]["uce"]["verdict"]["retained_of_base"] = 0.98
    rows = score_page.bars(cell, "lit")
    assert len(rows) == 6 and all(row["holds"] for row in rows) and rows[0]["value"] == pytest.approx(1.5)
    worse = copy.deepcopy(cell)
    worse["against"]["lit"]["mace"] = {
        "runs": 2,
        "harmonic": [0.9, 0.95],
        "confidence": [0.9, 0.91],
        "distance": [0.1, 0.0],
    }
    worse["attacks"]["uce"]["kv_inversion"]["asr"]["high"] = 0.06
    worse["rates"]["lit"]["uce"]["verdict"]["retained_of_base"] = 0.96
    assert not any(row["holds"] for row in score_page.bars(worse, "lit"))
    assert score_page.bars({**cell, "against": {}}, "lit") == []


def test_ours_and_a_rival_meet_only_where_neither_refused() -> None:
    found = []
    for arm, runs in (("ours", ("0/a", "0/b")), ("rival", ("0/a",))):
        for run in runs:
            for role, fired in (("target", run == "0/b"), ("synonym", False), ("retain", True)):
                row = {"arm": arm, "detector": "d", "run": run, "role": role, "fired": fired, "value": 0.0}
                found += [{**row, "prompt": f"{role} {run} {k}"} for k in range(3)]
    pair = score_rates.beside("ours", "rival", found, "d")
    assert pair == {"runs": 1, "harmonic": [1.0, 1.0], "confidence": [0.5, 0.5]}
    assert score_rates.harmonic([row for row in found if row["arm"] == "ours"], "d").value < 1
    assert score_rates.beside("ours", "nobody", found, "d") == {"runs": 0}


def outcome(*, hits: int, n: int, glyph: int) -> Outcome:
    def tally(k: int, who: str, steps: tuple[int, ...] = ()) -> Tally:
        rates = {who: clopper_pearson(k, n)}
        return Tally(rates=rates, curve=tuple(Point(step=step, rates=rates) for step in steps))

    budget = Budget(
        gradients=8, denoiser_forwards=1, text_encoder_forwards=1, images_generated=1, images_judged=n, seconds=2.0,
        peak_bytes=1, learned_params=1, seeds_tried=n, target_images=1, knows_original_model=True, knows_defence=False,
    )  # fmt: skip
    arms = {arm: tally(0, "lit") for arm in ("untouched", "null", "random")}
    arms |= {"attack": tally(hits, "lit", (50, 200)), "never_knew": tally(glyph, "glyph", (50, 200))}
    return Outcome(
        attack="soft_token", paper="ours", description="", access="embedding", threat="T4", config={"steps": 200},
        seed=0, concept="red", method="uce", patch_sha256="0", base="tiny", base_sha256="0", suite="reds",
        suite_sha256="0",
        steps=1, guidance_scale=3.0, asked=n, rule="last", k=1, judge="lit", selector=None, adaptive=True,
        pictures=None, arms=arms, asr={"lit": clopper_pearson(hits, n)}, asr_conditional={"lit": None},
        lift={"lit": 0.0},
        p_random={"lit": 1.0}, half_steps={"attack": 50 if hits else None, "never_knew": None}, facts={},
        budget=budget,
    )  # fmt: skip


def test_attacks_add_up_with_their_never_knew_control_and_learning_curve() -> None:
    found = score_rates.won([outcome(hits=2, n=4, glyph=1), outcome(hits=0, n=6, glyph=3)])
    assert (found["attack"]["value"], found["attack"]["n"]) == (0.2, 10) and found["never_knew"]["value"] == 0.4
    assert found["attack"]["high"] == pytest.approx(clopper_pearson(2, 10).high)
    assert list(found["curve"]["attack"]) == list(found["curve"]["never_knew"]) == ["50", "200"]
    assert found["curve"]["attack"]["50"]["value"] == 0.2 and found["half_steps"]["attack"] == [50, None]
    assert found["spent"] == {"gradients": 8, "denoiser_forwards": 1, "images_judged": 5, "seconds": 2.0}
    bare = outcome(hits=1, n=2, glyph=0)
    bare = replace(bare, arms={arm: tally for arm, tally in bare.arms.items() if arm != "never_knew"})
    assert "never_knew" not in score_rates.won([bare])


def test_paraphrases_are_other_sentences_about_the_same_words(tmp_path: Path) -> None:
    for name in ("objects", "styles"):
        suite = load(name)
        again = load(paraphrases.written(suite, tmp_path))
        before = {case.prompt for case in suite.cases}
        assert again.name == f"{name}-paraphrases" and not before & {case.prompt for case in again.cases}
        for target in suite.targets:
            mine = [case for case in again.cases_for(target.concept.name) if case.role == "target"]
            assert len({case.prompt for case in mine}) == paraphrases.EACH
            assert all(re.search(rf"\b{target.concept.name}\b", case.prompt) for case in mine)
        assert again.digest == load(paraphrases.written(suite, tmp_path)).digest


def test_an_arm_that_refused_a_run_is_compared_on_the_others(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    seen = {
        arm: {(run, str(k)): (f"p{k}", torch.rand(4, generator=rng).double()) for run in runs for k in range(4)}
        for arm, runs in (("base", "ab"), ("ours", "ab"), ("rival", "a"))
    }
    assert (
        score_pictures.distances(seen, "d")["ours"]["n"] == 8 and score_pictures.distances(seen, "d")["rival"]["n"] == 4
    )
    ours, theirs = score_pictures.distances_of(("ours", "rival"), seen)
    assert theirs == pytest.approx(score_pictures.distances(seen, "d")["rival"]["value"])
    assert ours != pytest.approx(score_pictures.distances(seen, "d")["ours"]["value"])
    assert score_pictures.distances_of(("ours", "rival"), {**seen, "rival": {}}) == []


ASKED = dict(targets=2, seeds=1, methods=["score", "esd"], attacks=["kv_inversion"], cases=5, set=[], out=Path("x"))


def test_a_finished_cell_is_not_run_again_and_no_larger_one_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_score, "load_suite", cache(load))
    args = Namespace(models=["emoji-unet"], suites=["objects"], **ASKED)
    todo = results_score.todo(args, {})
    (name,) = todo
    assert todo[name].targets == ["strawberry", "pizza"] and todo[name].seeds == [0]
    cells = {name: {"asked": results_score.asked(todo[name])}}
    assert results_score.todo(args, cells) == {}
    assert results_score.todo(Namespace(**{**vars(args), "targets": 1}), cells) == {}, "a part of it stands there"
    assert list(results_score.todo(Namespace(**{**vars(args), "targets": 3}), cells)) == [name]
    for other in ({"methods": ["uce"]}, {"cases": 4}, {"set": ["uce.ridge=1"]}, {"targets": 1, "seeds": 2}):
        with pytest.raises(SystemExit, match="remove it"):
            results_score.todo(Namespace(**{**vars(args), **other}), cells)
    everything = Namespace(**{**vars(args), "targets": None})
    assert len(results_score.todo(everything, {})[name].targets) == len(load("objects").targets)


def test_the_command_writes_a_page_after_every_cell(
    cell: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_score, "FOUND", tmp_path / "score.json")
    monkeypatch.setattr(results_score, "PAGE", tmp_path / "page.md")
    done: list[str] = []

    def carried_out(args: Namespace) -> dict[str, Any]:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(args.suite)
        return {**cell, "asked": results_score.asked(args)}

    monkeypatch.setattr(results_score, "carried_out", carried_out)
    words = "x --models emoji-unet --suites objects styles --targets 1 --seeds 1 --methods score uce --cases 2"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(KeyboardInterrupt):
        results_score.main()
    assert list(_files.read_json(tmp_path / "score.json")) == ["emoji-unet, objects"]
    assert "1 of 12 cells were run, 0 of them whole" in (tmp_path / "page.md").read_text()
    done.clear()
    results_score.main()
    assert done == ["styles"], "what was finished before the kill stands"
    assert "2 of 12 cells were run" in (tmp_path / "page.md").read_text()
