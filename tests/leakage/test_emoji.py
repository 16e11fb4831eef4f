"""One real certificate, small: UCE on the embedded model, its own detectors, all five arms."""

from pathlib import Path

import pytest

from expunge.core.eraser import Run
from expunge.leakage import twins
from expunge.stages import _leakage
from expunge.stages.erase import erase
from expunge.stages.leakage import Question, leakage
from expunge.stages.recipe import parse
from expunge.suites.load import load

PAIRS = 200
RECIPE = """
[model]
name = "emoji-unet"
[method]
name = "uce"
[[target]]
name = "strawberry"
anchor = { name = "apple" }
"""


@pytest.mark.slow
def test_a_real_erasure_passes_its_controls_and_is_told_from_the_base(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(twins.PAIRS, "quick", PAIRS)
    erase(parse(RECIPE), tmp_path, Run())
    question = Question(concept="strawberry", level="quick", suite=load("objects"))
    found = leakage(tmp_path, question, Run())
    assert found.controls.failed == () and found.controls.ceiling_bits > 0.5
    assert found.verdicts[0].kind in ("leak", "none")
    for row in found.detector:
        shown = row.corrected_rate_ci
        assert shown["concept"][1] < shown["base-concept"][0]
        assert row.I_lo <= row.I_hi < 0.5
    assert [each.text for each in _leakage.read(tmp_path)[0].verdicts] == [each.text for each in found.verdicts]
