"""The page's section on leakage: the certificate's own sentences, explained, and nothing that they do not say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.leakage.record import LeakageCertificate, PathRow
from expunge.report import words
from expunge.report.page import render
from expunge.stages import _leakage
from leakage.made import made
from report.made_run import write_run
from report.test_page import Outline, plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", arms=("base", "uce"), per_prompt=1)


def certify(folder: Path, certificate: LeakageCertificate) -> None:
    _leakage.write(_leakage.place(folder / "uce", certificate.scope.concept), certificate)


def test_without_a_certificate_the_page_claims_nothing(folder: Path) -> None:
    text = plain(render(folder))
    assert "gives away" not in text and "≤" not in text and "LEAK" not in text


def test_how_far_from_a_coin_the_head_can_be_is_told_where_it_is_known(folder: Path) -> None:
    older = made(bits=0.0)
    certify(folder, older)
    assert "give or take" not in plain(render(folder))
    certify(folder, replace(older, lower=replace(older.lower, equivalence=0.031)))
    assert "50 % of the time, give or take 3.1 %" in plain(render(folder))


@pytest.mark.parametrize("bits", [0.0, 0.21])
def test_every_verdict_has_its_words_and_there_is_one_picture(bits: float, folder: Path) -> None:
    certificate = made(bits=bits)
    before = len(Outline(render(folder)).all("svg"))
    certify(folder, certificate)
    page = render(folder)
    text = plain(page)
    for verdict in certificate.verdicts:
        assert text.count(verdict.text) == 1
    assert ("four times out of five" in text) == (bits == 0)
    assert ("better than by chance" in text) == (bits > 0)
    for name, said in words.NOT_SAID:
        assert name in text and said in text
    drawings = Outline(page).all("svg")
    assert len(drawings) == before + 1
    label = next(each["aria-label"] for each in drawings if "give away" in each["aria-label"])
    assert f"erased model: at least {bits:.2g} bit, more is not excluded" in label
    assert "seen by judge: at least 0 bit, at most 0.018 for this detector" in label
    assert render(folder) == page


def test_an_upper_bound_on_the_page_is_one_of_the_grammar(folder: Path) -> None:
    """Every "LEAK ≤" on the page stands in a verdict; outside verdicts the sign occurs only to explain it."""
    certificate = made(bits=0.1)
    certify(folder, certificate)
    text = plain(render(folder))
    for verdict in certificate.verdicts:
        text = text.replace(verdict.text, "")
    assert "LEAK" not in text
    assert text.count("≤") == 1 and "names its scope says “≤”" in text
    for forbidden in ("provably", "independent of the concept", "guarantee"):
        assert forbidden not in text


@pytest.mark.parametrize("bits, said", [(0.031, "at most 0.031 bit, est"), (1.0, "at most 1 bit, vacuous, est")])
def test_a_path_row_says_what_it_bounds_and_when_that_is_nothing(bits: float, said: str, folder: Path) -> None:
    row = PathRow(kl10=0.04, kl01=0.05, I_hi=bits, vacuous=bits >= 1, base_ratio=0.25)
    certify(folder, replace(made(bits=0.1), path=row))
    text = plain(render(folder))
    assert said in text and "divergence 0.25 of the base model's" in text.replace("’", "'")
    assert ("vacuous" in text) == (bits >= 1)


def test_a_failed_control_shows_the_reason_and_no_picture(folder: Path) -> None:
    certificate = made(bits=0.3)
    before = len(Outline(render(folder)).all("svg"))
    certify(folder, replace(certificate, controls=replace(certificate.controls, null_p=0.001)))
    text = plain(render(folder))
    assert "INVALID (control failed)" in text and "the harness itself tells the arms apart" in text
    assert "LEAK" not in text and len(Outline(render(folder)).all("svg")) == before


def test_edited_and_stale_certificates_are_refused(folder: Path) -> None:
    certify(folder, made(bits=0.3))
    file = next(folder.rglob("certificate.json"))
    data = json.loads(file.read_text())
    data["lower"]["portfolio_bits"] = 0.0
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"certificate\.json: verdicts .* do not follow"):
        render(folder)
    certify(folder, made(bits=0.3, patch="2" * 64))
    with pytest.raises(InputError, match="another patch"):
        render(folder)


def test_reading_and_showing_it_needs_no_torch(folder: Path) -> None:
    certify(folder, made(bits=0.3))
    program = (
        f"import sys; from pathlib import Path; from expunge.report.page import render; "
        f"page = render(Path({str(folder)!r})); print('LEAK' in page, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
