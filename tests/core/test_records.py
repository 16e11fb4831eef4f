import dataclasses
import json

import pytest

from expunge.core.card import Base, Card, Contents, Provenance
from expunge.core.codec import from_json, to_json
from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.core.records import Arm, Case, Estimate, Summary

HALF = Estimate(value=0.5, low=0.4, high=0.6, level=0.95, n=100, clusters=10, how="clopper-pearson")


def card() -> Card:
    return Card(
        method="esd",
        paper="arXiv:2303.07345",
        description="Train.",
        config={"steps": 3, "lr": 1e-5, "group": "cross_kv"},
        given=("steps",),
        target=(Concept.of("cat"),),
        anchor=(None,),
        retain=(Concept.of("dog"),),
        base=Base(name="tiny-unet", revision="1", family="unet", licence="Apache-2.0", sha256="0" * 64),
        patch=Contents(kind="weights", meta={}, sha256="1" * 64, tensors=2, bytes=8, share=0.1),
        run=Provenance(
            seed=0,
            device="cpu",
            dtype="float32",
            seconds=1.5,
            peak_bytes=10,
            packages={"torch": "2"},
            source_sha256="2" * 64,
            package_sha256="3" * 64,
            commit="abc",
            dirty=False,
        ),
        claims={"deterministic": True},
    )


def test_card_survives_json_with_sorted_keys_and_one_newline():
    text = card().to_json()
    assert Card.from_json(text) == card()
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("method"),
        lambda d: d.update(colour="red"),
        lambda d: d.update(schema=2),
        lambda d: d["base"].update(sha256=7),
        lambda d: d["target"][0].update(kind="animal"),
        lambda d: d.update(given="steps"),
        lambda d: d["run"].update(seed=True),
        lambda d: d["run"].update(commit=None),
        lambda d: d["run"].update(package_sha256=None),
        lambda d: d.update(target=None),
    ],
)
def test_damaged_cards_are_refused(damage):
    data = json.loads(card().to_json())
    damage(data)
    with pytest.raises(InputError):
        Card.from_json(json.dumps(data))


def test_a_card_older_than_a_fact_is_read_and_says_that_it_lacks_it():
    data = json.loads(card().to_json())
    for fact in ("certificates", "parts", "budget"):
        data.pop(fact, None), data["run"].pop(fact, None)
    old = Card.from_json(json.dumps(data))
    assert old == card() and old.certificates is None and old.run.parts is None


def test_text_that_is_not_json_is_refused():
    with pytest.raises(InputError, match="not valid JSON"):
        Card.from_json("{")


def test_unknown_provenance_must_be_declared():
    unnamed = {"package_sha256": None, "commit": None, "dirty": None}
    assert not dataclasses.replace(card().run, **unnamed, recorded=False).recorded
    with pytest.raises(InputError, match="--no-provenance"):
        dataclasses.replace(card().run, **unnamed)
    # a wheel has no commit, and its sources still have a hash
    assert dataclasses.replace(card().run, commit=None, dirty=None).recorded


def test_one_line_json_for_rows():
    case = Case(
        case_id="a", target="cat", role="target", concept="cat", style="flat", background="red", prompt="p", seed=3
    )
    line = to_json(case, indent=None)
    assert "\n" not in line
    assert from_json(Case, line) == case


def test_nan_cannot_be_written():
    with pytest.raises(ValueError, match="Out of range"):
        to_json(dataclasses.replace(card(), config={"lr": float("nan")}))


@pytest.mark.parametrize("change", [{"value": 0.7}, {"low": 0.55}, {"high": float("nan")}, {"level": 1.0}])
def test_impossible_estimates_are_refused(change):
    with pytest.raises(InputError):
        dataclasses.replace(HALF, **change)


def test_a_summary_needs_the_base_row():
    arm = Arm(name="erased", detector="judge", rates={"target_rate": HALF}, raw={"target_rate": HALF})
    with pytest.raises(InputError, match="base"):
        Summary(suite="objects", suite_sha256="0", targets=("cat",), arms=(arm,))
    both = Summary(
        suite="objects", suite_sha256="0", targets=("cat",), arms=(dataclasses.replace(arm, name="base"), arm)
    )
    assert from_json(Summary, to_json(both)) == both
