"""What a person sees on a terminal: bars that arrive at their ends, and nothing of them on a pipe."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from expunge.cli.console import Out


def terminal(*, machine: bool = False) -> tuple[Out, io.StringIO]:
    out, stream = Out(machine=machine), io.StringIO()
    out.stderr = Console(file=stream, force_terminal=True, width=100, highlight=False)
    out.lively = not machine and out.stderr.is_terminal
    return out, stream


def test_bars_name_their_work_and_count_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    out, stream = terminal()
    with out.progress() as report:
        for done in range(4):
            report("layers", done, 3)
        report("load tiny-unet", 0, 1)
        report("load tiny-unet", 1, 1)
    last = stream.getvalue().splitlines()[-3:-1]
    assert "layers" in last[0] and "3/3" in last[0]
    assert "load tiny-unet" in last[1] and "1/1" in last[1]
    assert capsys.readouterr().out == ""


def test_a_training_shows_its_loss_and_its_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "sheet.png")
    out, stream = terminal()
    with out.live() as live:
        live.log("loss", 0, 2.0)
        live.log("collateral", 0, 0.25)
        live.log("loss", 1, 0.0)
        live.progress("fit", 1, 2)
        live.progress("walking", 1, 1)
        live.picture("after step 1: cat, dog", tmp_path / "sheet.png")
    said = stream.getvalue()
    assert "fit, loss 1.9, collateral 0.25" in said  # a running mean of twenty steps
    assert "walking," not in said
    assert "after step" in said and said.count("▀") == 96 * 24
    quiet, stream = terminal(machine=True)
    with quiet.live() as live:
        live.picture("after step 1", tmp_path / "sheet.png")
    assert stream.getvalue() == ""


def test_a_status_spins_while_waiting() -> None:
    out, stream = terminal()
    with out.waiting("loading the model"):
        pass
    assert "loading the model" in stream.getvalue()


@pytest.mark.parametrize("machine", [True, False])
def test_a_pipe_gets_no_bars(machine: bool, capsys: pytest.CaptureFixture[str]) -> None:
    out = Out(machine=machine)
    assert not out.lively
    with out.progress() as report, out.waiting("loading the model"):
        report("layers", 1, 3)
    streams = capsys.readouterr()
    assert streams.out == streams.err == ""
