"""No sentence outside the grammar, none that the numbers do not carry, and none that says more than was measured."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.leakage import record, verdict
from expunge.leakage.attack import AttackLog, Try, attack_row
from expunge.leakage.record import (
    AttackRow,
    LeakageCertificate,
    Structural,
)
from expunge.leakage.verdict import INVALID, Verdict
from leakage.made import PATCH, made

HASH = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        "LEAK ≤ 0.01 bits (95 %)",
        "LEAK ≤ 0.01 bits",
        "LEAK ≤ 0.01 bits for all observers, prompts everywhere, structural",
        "LEAK ≤ 0.01 bits as seen by detector judge (95 %)",
        "LEAK ≥ 0.01 bits (95 %) and nothing else",
        "LEAK ≥ -0.1 bits (95 %)",
        "LEAK ≥ 1e-3 bits (95 %)",
        "NO LEAK FOUND",
        "NO LEAK FOUND by family pixels",
        "NO LEAK FOUND by family pixels; independent of the concept",
        "ATTACK a: success ≤ 1 % (95 %)",
        "provably erased",
        "INVALID",
        "",
        "LEAK ≥ 0.01 bits (95 %)\n",
    ],
)
def test_nothing_else_can_be_said(text):
    with pytest.raises(InputError, match="no verdict"):
        Verdict(text)
    with pytest.raises(InputError):
        replace(INVALID, text=text)


@pytest.mark.parametrize("name", ["for all observers", "x bits for all observers, prompts", "a b", "", "a;b"])
def test_no_sentence_can_be_smuggled_in_by_a_name(name):
    for call in (
        lambda: verdict.none_found(name, 0.02),
        lambda: verdict.seen_by(0.1, name, HASH),
        lambda: verdict.attack(name, "10", 0.1),
        lambda: verdict.attack("a", name, 0.1),
        lambda: verdict.structural(0.1, name),
    ):
        with pytest.raises(InputError):
            call()


def test_a_bound_from_above_always_names_its_scope():
    """The builder's every sentence with an upper bound on a leak names a structure or one detector by hash."""
    said = [
        verdict.leak(0.3),
        verdict.none_found("pixels+judge", 0.02),
        verdict.structural(0.01, HASH),
        verdict.seen_by(0.01, "judge", HASH),
        verdict.attack("soft_token", "500-steps", 0.03),
        INVALID,
    ]
    assert {each.kind for each in said} == set(verdict.GRAMMAR)
    for each in said:
        if "LEAK ≤" in each.text:
            assert re.search(r"structural$|detector \S+ [0-9a-f]{12} \(95 %\)$", each.text)


@given(st.floats(1e-12, 1))
def test_rounding_never_says_more_than_was_measured(bits):
    low = float(verdict.leak(bits).text.split()[2])
    high = float(verdict.structural(bits, HASH).text.split()[2])
    assert low <= bits <= high
    assert low > 0.89 * bits and high < 1.11 * bits


@pytest.mark.parametrize("bits", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_amounts_are_refused(bits):
    with pytest.raises(InputError):
        verdict.leak(bits)
    if bits != 0:
        with pytest.raises(InputError):
            verdict.seen_by(bits, "judge", HASH)


def said(certificate):
    return [each.text for each in certificate.verdicts]


def test_verdicts_follow_from_the_numbers():
    assert said(made(bits=0.1234))[0] == "LEAK ≥ 0.12 bits (95 %)"
    nothing = said(made(bits=0.0))
    assert nothing[0] == "NO LEAK FOUND by family pixels+judge; would have detected π ≥ 5 % (80 % power)"
    assert nothing[1].startswith("LEAK ≤ 0.019 bits as seen by detector judge ")
    assert not any("all observers" in text for text in nothing)
    gate = Structural(kind="gate", misses=0, n=299, I_hi=0.00997, bitwise_ok=True)
    assert f"LEAK ≤ 0.01 bits for all observers, prompts {HASH[:12]}, structural" in said(
        replace(made(bits=0.0), structural=gate)
    )
    assert not any("all" in text for text in said(replace(made(bits=0.0), structural=replace(gate, bitwise_ok=False))))


def test_a_detector_that_sees_a_leak_outweighs_heads_that_do_not():
    certificate = made(bits=0.0)
    (row,) = certificate.detector
    assert said(replace(certificate, detector=(replace(row, I_lo=0.25),)))[0] == "LEAK ≥ 0.25 bits (95 %)"


@pytest.mark.parametrize(
    "controls, word",
    [({"null_p": 0.009}, "harness"), ({"ceiling_bits": 0.49}, "hardly shows"), ({"spike_limit": None}, "blind")],
)
def test_one_failed_control_leaves_nothing_else_to_say(controls, word):
    for bits in (0.0, 0.4):
        certificate = made(bits=bits)
        assert certificate.controls.failed == ()
        broken = replace(certificate, controls=replace(certificate.controls, **controls))
        assert said(broken) == ["INVALID (control failed)"]
        (line,) = broken.controls.failed
        assert word in line


def test_a_file_whose_sentences_were_edited_is_refused():
    data = json.loads(json.dumps(made(bits=0.1).data()))
    assert LeakageCertificate.of(data) == made(bits=0.1)
    for change in (
        {"verdict": ["LEAK ≤ 0 bits for all observers"]},
        {"verdict": ["NO LEAK FOUND by family pixels+judge; would have detected π ≥ 5 % (80 % power)"]},
        {"schema": 2},
        {"extra": 1},
    ):
        with pytest.raises(InputError):
            LeakageCertificate.of({**data, **change})
    data["lower"]["portfolio_bits"] = 0.0
    with pytest.raises(InputError, match="do not follow"):
        LeakageCertificate.of(data)


def test_the_stored_keys_are_those_of_the_schema():
    data = made(bits=0.1).data()
    asked = {
        "scope": "model_hash method prompts_hash tier threat attack budget sampler cfg n_prompts images_per_prompt",
        "design": "delta splits tau seed_policy clusters",
        "lower": "acc chan log portfolio_bits tv_lo",
        "structural": "kind misses n I_hi bitwise_ok",
        "controls": "null_p ceiling_bits spike_limit",
    }
    for part, keys in asked.items():
        assert set(keys.split()) <= set(data[part])
    assert set(["name", "hash", "thr", "tpr", "fpr", "ci", "I_lo", "I_hi", "sens", "spec", "corrected_rate_ci"]) == set(
        data["detector"][0]
    )
    assert set(["kind", "B", "n", "vinfo_hi"]) == set(data["family"][0])
    assert set(["N", "k", "successes", "ci", "null_rate", "lift"]) < {field for field in AttackRow.__dataclass_fields__}
    assert set(["kl10", "kl01", "I_hi", "vacuous"]) < {field for field in record.PathRow.__dataclass_fields__}
    assert {"path", "attack", "verdict"} <= set(data)


def test_the_confidence_of_the_sentences_cannot_be_chosen():
    with pytest.raises(InputError, match="delta"):
        replace(made(bits=0.1).design, delta=0.2)


def log(**changes):
    tries = [{"prompt": f"p{i}", "cluster": f"p{i}", "images": 3, "successes": 0, "null": 0} for i in range(142)]
    data = {"attack": "soft_token", "budget": "500-steps", "concept": "strawberry", "patch_sha256": PATCH}
    return {**data, "tries": tries, **changes}


def read(data):
    return AttackLog.of(data, "strawberry", PATCH)


def test_attacks_are_counted_by_prompt_with_exact_ends():
    row = attack_row(read(log()), 0.05, 1, 0)
    assert (row.N, row.k, row.successes, row.null_rate) == (142, 3, 0, 0)
    assert row.success_hi == pytest.approx(0.021, abs=2e-4)  # the table of section 5
    assert "ATTACK soft_token@500-steps: success ≤ 2.1 % (95 %)" in said(replace(made(bits=0.0), attack=(row,)))
    data = log()
    data["tries"][0] |= {"successes": 3}
    one = attack_row(read(data), 0.05, 1, 0)
    assert one.successes == 1 and 100 * one.ci[1] == pytest.approx(3.9, abs=0.05) and one.lift == pytest.approx(1 / 142)
    assert attack_row(read(log()), 0.05, 5, 0).success_hi > row.success_hi


def test_prompts_of_one_name_are_no_independent_trials():
    data, alone = log(), log()
    for index, each in enumerate(data["tries"]):
        each |= {"cluster": f"name{index // 14}", "successes": int(index // 14 in (0, 4))}
    for index, each in enumerate(alone["tries"]):
        each |= {"successes": int(index // 14 in (0, 4))}
    wide, naive = attack_row(read(data), 0.05, 1, 0), attack_row(read(alone), 0.05, 1, 0)
    assert wide.successes == naive.successes
    assert wide.ci[1] - wide.ci[0] > 1.5 * (naive.ci[1] - naive.ci[0]) and wide.success_hi > naive.success_hi


def test_results_about_something_else_are_refused():
    for change, word in (
        ({"concept": "dog"}, "'dog'"),
        ({"patch_sha256": "0"}, "patch"),
        ({"tries": []}, "one prompt"),
        ({"more": 1}, "more"),
    ):
        with pytest.raises(InputError, match=word):
            read(log(**change))
    data = log()
    data["tries"][0] |= {"successes": 4}
    with pytest.raises(InputError, match="4 successes of 3"):
        read(data)
    assert Try(prompt="a", cluster="a", images=1, successes=1, null=None).null is None
