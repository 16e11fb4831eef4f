"""Numbers as a reader sees them."""

import pytest

from expunge.report.words import per_cent


@pytest.mark.parametrize(
    "value, shown",
    [(0.00031, "0.031 %"), (0.0752, "7.5 %"), (0.91, "91 %"), (1.3, "130 %"), (123.4, "12000 %"), (0.0, "0 %")],
)
def test_a_share_never_shows_a_power_of_ten(value: float, shown: str) -> None:
    assert per_cent(value) == shown
