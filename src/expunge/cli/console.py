"""Where commands write: results on stdout, everything that moves on stderr."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

TRAINING, SMOOTH, BLOCKS = "fit", 20, 96  # label of a training's bar, steps of its mean loss, columns of a preview
Report = Callable[[str, int, int], None]
"""`progress(label, done, total)` of a Run."""


class Out:
    """The two streams of one command: `machine` asks for JSON alone on stdout and no progress bars."""

    def __init__(self, *, machine: bool) -> None:
        self.machine = machine
        self.stderr = Console(stderr=True, highlight=False)
        self.lively = not machine and self.stderr.is_terminal

    def emit(self, data: Mapping[str, Any]) -> None:
        """Print the result for machines, sorted and indented; silent for people."""
        if self.machine:
            typer.echo(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))

    def say(self, text: str) -> None:
        """Print a line of the result for people."""
        if not self.machine:
            typer.echo(text)

    def note(self, text: str) -> None:
        """Print a line about what is going on, to stderr."""
        if not self.machine:
            typer.echo(text, err=True)

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people; columns of numbers align right."""
        if self.machine:
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column, head in enumerate(heads):
            numbers = all(row[column][:1].isdigit() or row[column] in ("", "–") for row in rows)
            table.add_column(head, justify="right" if rows and numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 200  # a pipe has no width of its own; rich's 80 would fold what grep looks for
        console.print(table)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show that something of unknown length is going on; quiet if not lively."""
        if not self.lively:
            yield
            return
        with self.stderr.status(text):
            yield

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Yield a `progress(label, done, total)` that draws one bar with an ETA per label; quiet if not lively."""
        with self.live() as live:
            yield live.progress

    @contextmanager
    def live(self) -> Iterator["Live"]:
        """Yield what follows a run: bars, the latest numbers of a training, pictures; quiet if not lively."""
        if not self.lively:
            yield Live(None)
            return
        from rich import progress as rich

        columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
        times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
        with rich.Progress(*columns, *times, console=self.stderr) as bars:
            yield Live(bars)


class Live:
    """One bar per label; that of a training carries its loss, a running mean, and its collateral change."""

    def __init__(self, bars: "Progress | None") -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.numbers: dict[str, float] = {}

    def progress(self, label: str, done: int, total: int) -> None:
        """Move the bar of a label."""
        if self.bars is None:
            return
        if label not in self.tasks:
            self.tasks[label] = self.bars.add_task(label, total=total)
        said = [label, *(f"{name} {value:.3g}" for name, value in self.numbers.items() if label == TRAINING)]
        self.bars.update(self.tasks[label], description=", ".join(said), completed=done, total=total)

    def log(self, name: str, step: int, value: float) -> None:
        """Remember a number of a training for its bar."""
        if name == "loss":
            before = self.numbers.get(name, value)
            self.numbers[name] = before + (value - before) / (SMOOTH if step else 1)
        elif name == "collateral":
            self.numbers[name] = value

    def picture(self, text: str, file: Path) -> None:
        """Show a preview above the bars, two pixels in a character."""
        if self.bars is None:
            return
        from expunge.cli.blocks import blocks

        self.bars.console.print(text, blocks(file, width=min(BLOCKS, self.bars.console.width)), sep="\n")
