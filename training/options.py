"""The command line of a training run: a bad option is one line and exit code 2."""

import argparse
import math
from typing import NoReturn

from expunge.core.errors import InputError
from training import loop

RESUMES = """The same command, given again after a kill, goes on from the last checkpoint and ends
at the bits of an unbroken run. Another is refused until the run is finished, and then takes it further."""
ASIDE = ("run", "cache", "publish", "tokenizer")  # what no number depends on


class Parser(argparse.ArgumentParser):
    """Argument parser that says what is wrong, and not also how to use it."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser(text: str | None) -> Parser:
    """A parser described by a module's own words, and what a kill means to it."""
    return Parser(description=text, epilog=RESUMES, formatter_class=argparse.RawDescriptionHelpFormatter)


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: whole numbers from 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0."""
    return 0 if text == "0" else count(text)


def rate(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: numbers above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to below 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: numbers from 0 to below 1")
    return value


def number(text: str) -> float:
    """A number, or NaN, which no bound allows."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def recipe(args: argparse.Namespace) -> dict[str, int | float | str | None]:
    """All that was asked for and that numbers depend on."""
    return {"first": 0, **{name: value for name, value in vars(args).items() if name not in ASIDE}}


def settle(parser: Parser, args: argparse.Namespace) -> None:
    """End the program where options contradict each other, or the unfinished run that lies in `args.run`."""
    asked = recipe(args)
    processes = asked.get("processes", 1)
    if args.batch % processes:
        parser.error(f"--batch {args.batch} cannot be shared by --processes {processes}; legal: multiples of it")
    if asked["first"] >= args.steps:
        parser.error(f"--first {asked['first']} leaves nothing of --steps {args.steps}; legal: below it")
    try:
        loop.standing(args.run, asked)
    except InputError as error:
        parser.error(str(error))
