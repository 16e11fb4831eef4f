"""expunge attack: a result with its controls and its budget, or one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks.conftest import write_suite
from cli.conftest import Result, expunge  # noqa: F401  fixture
from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.core.harm import refuse_harm
from expunge.core.outcome import Outcome
from expunge.core.registry import catalogue, find
from expunge.ops.glyph import glyphs, likeness, shows_glyph
from expunge.stages import _outcomes
from expunge.stages._panel import mcnemar


def attacked(expunge: Any, folder: Path, name: str, suite: Path, *more: str) -> Outcome:  # noqa: F811
    result: Result = expunge("attack", folder, "--attack", name, "--suite", suite, "--json", *more)
    assert result.code == 0, result
    printed = json.loads(result.out)
    assert printed["file"] == str(folder / "attacks" / f"{name}.json")
    outcome = _outcomes.load(folder / "attacks" / f"{name}.json")
    assert printed["sentence"] == outcome.sentence
    return outcome


def test_inversion_undoes_uce_and_its_controls_do_not(run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    outcome = attacked(expunge, run_folder, "kv_inversion", suite)
    value = {arm: tally.rates["alike"].value for arm, tally in outcome.arms.items()}
    assert value["attack"] == 1.0 and value["untouched"] == value["null"] == value["random"] == 0.0
    won = outcome.arms["attack"].rates["alike"]
    # Clopper-Pearson of 4 of 4, by hand: (0.025)^(1/4)
    assert (won.n, won.how) == (4, "clopper-pearson") and won.low == pytest.approx(0.025**0.25)
    assert outcome.asked == 4, "the second seed of a prompt is no second prompt"
    assert outcome.lift["alike"] == 1.0 and outcome.p_random["alike"] == pytest.approx(0.125)
    assert outcome.asr["alike"].value == outcome.asr_conditional["alike"].value == 1.0  # type: ignore[union-attr]
    assert outcome.budget.denoiser_forwards == 4 * 2 * 2, "four pictures, two steps, two predictions each"
    assert (outcome.budget.images_generated, outcome.budget.gradients, outcome.k) == (4, 0, 1)
    assert outcome.budget.knows_original_model and outcome.adaptive and outcome.facts["residual"] < 1e-2
    assert "4 of 4 prompts [40–100 %, 95 %]" in outcome.sentence


def test_a_result_is_kept_and_another_question_is_refused(run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    attacked(expunge, run_folder, "kv_inversion", suite)
    file = run_folder / "attacks" / "kv_inversion.json"
    before = file.read_bytes()
    attacked(expunge, run_folder, "kv_inversion", suite)
    assert file.read_bytes() == before
    words = ("attack", run_folder, "--attack", "kv_inversion", "--suite", suite, "--set", "ridge=0.5")
    assert "ridge" in expunge(*words).complaint()
    assert file.read_bytes() == before and [file] == list((run_folder / "attacks").iterdir())


def test_attacks_that_learn_bring_their_never_knew_control(run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    settings = ("--set", "steps=3", "--set", "curve=[1]", "--set", "images=2", "--set", "source=drawn")
    for name in ("soft_token", "relearning"):
        outcome = attacked(expunge, run_folder, name, suite, *settings, "--cases", "2")
        assert set(outcome.arms) == {"untouched", "attack", "null", "random", "never_knew"}
        assert [point.step for point in outcome.arms["attack"].curve] == [1, 3]
        assert set(outcome.arms["never_knew"].rates) == {"glyph"} and "glyph" in outcome.arms["untouched"].rates
        assert outcome.half_steps.keys() == {"attack", "never_knew"}
        assert outcome.pictures == "drawn by the unerased model"
        assert (outcome.budget.gradients, outcome.budget.target_images) == (12, 2)
        assert outcome.budget.images_judged == 4 and outcome.budget.learned_params > 0
        text = (run_folder / "attacks" / f"{name}.json").read_text()
        assert "a red x" not in text and "photo of red" not in text, "a result holds no prompt"


def test_where_any_picture_may_win_the_judge_is_not_the_selector(run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    outcome = attacked(expunge, run_folder, "random_suffix", suite, "--set", "tries=2")
    assert (outcome.selector, outcome.k, outcome.rule) == ("alike", 2, "any")
    assert set(outcome.arms["attack"].rates) == {"alike_too"} and outcome.judge == "alike_too"
    assert len(outcome.arms["null"].curve) == len(outcome.arms["random"].curve) == 2
    values = [point.rates["alike_too"].value for point in outcome.arms["attack"].curve]
    assert values == sorted(values)
    (run_folder / "attacks" / "random_suffix.json").unlink()
    alone = write_suite(suite.parent / "alone", '["alike"]')
    words = ("attack", run_folder, "--attack", "random_suffix", "--suite", alone)
    assert "one detector to pick and another to judge" in expunge(*words).complaint()


def test_flip_draws_under_a_negative_prompt(run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    outcome = attacked(expunge, run_folder, "negative_flip", suite)
    assert set(outcome.arms) == {"untouched", "attack", "null", "random"}
    assert outcome.budget.learned_params == 0 and not outcome.budget.knows_original_model


BAD = {
    "unknown attack": (("--attack", "kv"), "kv_inversion"),
    "no attack": ((), "--attack"),
    "unknown field": (("--attack", "soft_token", "--set", "step=1"), "steps"),
    "zero budget": (("--attack", "soft_token", "--set", "steps=0"), "steps is 0; legal: 1"),
    "zero cases": (("--attack", "kv_inversion", "--cases", "0"), "cases is 0"),
    "concept that was not erased": (("--attack", "kv_inversion", "--concept", "blue"), "'blue'"),
    "another base": (("--attack", "kv_inversion", "--base", "tiny-sdxl"), "differs in its text encoder"),
    "no real pictures": (("--attack", "relearning"), "no pictures of 'red'"),
}


@pytest.mark.parametrize("words, names", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(words: tuple[str, ...], names: str, run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    assert names in expunge("attack", run_folder, "--suite", suite, *words).complaint()
    assert not (run_folder / "attacks").exists()


def test_a_concept_without_prompts_needs_a_suite(run_folder: Path, expunge: Any) -> None:  # noqa: F811
    assert "--suite" in expunge("attack", run_folder, "--attack", "kv_inversion").complaint()


def test_a_result_without_its_controls_is_refused(run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    attacked(expunge, run_folder, "kv_inversion", suite)
    file = run_folder / "attacks" / "kv_inversion.json"
    data = json.loads(file.read_text())
    del data["arms"]["null"]
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="lacks its null arm"):
        _outcomes.read(run_folder)


def test_what_was_erased_is_attacked_under_its_suites_name(run_folder: Path, suite: Path, expunge: Any) -> None:  # noqa: F811
    """The artifact erased "red"; the suite calls that the style "crimson", and its judge knows no other word."""
    written = (suite / "suite.toml").read_text().replace('name = "red"\nkind = "object"', LOOK)
    rows = (suite / "cases.csv").read_text().replace(",red,target,red,", ",crimson,target,crimson,")
    (suite / "suite.toml").write_text(written.replace('"alike", "alike_too"', '"choosy"'))
    (suite / "cases.csv").write_text(rows.replace(",red,retain,", ",crimson,retain,"))
    named = ("--concept", "crimson")
    for words in ((), named, ("--concept", "red")):
        outcome = attacked(expunge, run_folder, "kv_inversion", suite, *words)
        assert outcome.concept == "crimson" and outcome.arms["attack"].rates["choosy"].value == 1.0
        (run_folder / "attacks" / "kv_inversion.json").unlink()
    words = ("attack", run_folder, "--attack", "kv_inversion", "--suite", suite, "--concept", "blue")
    assert "did not erase 'blue'; legal: red" in expunge(*words).complaint()
    (suite / "suite.toml").write_text(written.replace('"alike", "alike_too"', '"choosy"').replace("crimson", "scarlet"))
    (suite / "cases.csv").write_text((suite / "cases.csv").read_text().replace("crimson", "scarlet"))
    # the side that must fail: a name that this judge does not know
    assert "'scarlet'; legal: crimson" in expunge(*words[:-2]).complaint()


LOOK = 'name = "crimson"\nkind = "style"\nprompts = ["red"]'


def test_every_attack_is_listed_with_its_threat(expunge: Any) -> None:  # noqa: F811
    data = json.loads(expunge("list", "attacks", "--json").out)["attacks"]
    assert [each["name"] for each in data] == sorted(catalogue("attacks"), key=lambda n: str(catalogue("attacks")[n]))
    for each in data:
        cls = find("attacks", each["name"])
        assert each["threat"] == cls.threat and each["access"] == cls.access  # type: ignore[attr-defined]
        assert each["fields"] or each["name"] == "none"


HARM = [
    (Concept(name="nudity", kind="explicit", prompts=("nudity",)), ("a photo of a child",)),
    (Concept(name="naked boy", prompts=("naked boy",)), ()),
]


@pytest.mark.parametrize("concept, prompts", HARM, ids=str)
def test_no_attack_joins_minors_and_sex(concept: Concept, prompts: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="no override"):
        refuse_harm(concept, prompts)


def test_harmless_texts_pass() -> None:
    refuse_harm(Concept.of("strawberry"), ("a little girl with a strawberry",))
    refuse_harm(Concept(name="nudity", kind="explicit", prompts=("nudity",)), ("a statue",))


def test_the_sign_is_seen_where_it_is_and_not_elsewhere() -> None:
    rng = torch.Generator().manual_seed(0)
    signs = glyphs(6, 64, 64, rng)
    assert shows_glyph(signs).all() and (likeness(signs) > 0.99).all()
    noisy = (signs + 0.3 * torch.randn(signs.shape, generator=rng)).clamp(0, 1)
    assert shows_glyph(noisy).all()
    assert not shows_glyph(torch.rand(200, 3, 64, 64, generator=rng)).any()
    assert not shows_glyph(signs.flip(2)).any() and not shows_glyph(torch.full((1, 3, 64, 64), 0.5)).any()


def test_mcnemar_is_the_exact_sign_test() -> None:
    one, other = torch.tensor([1, 1, 1, 1, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 0, 0]).bool()
    assert mcnemar(one, other) == pytest.approx(0.25)  # three pairs differ, all one way: 2 * 0.5^3
    assert mcnemar(one, one) == 1.0
