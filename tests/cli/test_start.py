"""Help and lists come at once: no torch, and less than half a second."""

import json
import resource
import subprocess
import sys

import pytest
import typer

from expunge.cli.app import HOMES, assemble

QUICK = (
    ["--help"],
    ["erase", "--help"],
    ["plan", "--help"],
    ["list", "methods"],
    ["list", "suites", "--json"],
    ["--version"],
)
HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "numpy", "scipy", "PIL", "jinja2")
PROBE = """
import json, sys
from expunge.cli.app import run
code = run({words!r})
print(json.dumps([code, sorted(set(sys.modules) & set({heavy!r}))]), file=sys.stderr)
"""


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_nothing_heavy_is_imported(words: list[str]) -> None:
    program = PROBE.format(words=words, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, heavy = json.loads(done.stderr.splitlines()[-1])
    assert (code, heavy) == (0, [])


def test_the_probe_would_see_torch() -> None:
    program = PROBE.format(words=["--version"], heavy=HEAVY).replace("import json", "import torch, json", 1)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch" in json.loads(done.stderr.splitlines()[-1])[1]


def seconds(*words: str) -> float:
    """Processor time of one command: what a person waits for on an idle machine, whatever else runs on this one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [["--help"], ["list", "methods"]], ids=" ".join)
def test_help_takes_less_than_half_a_second(words: list[str]) -> None:
    assert min(seconds("-m", "expunge.cli", *words) for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", HOMES)
def test_the_help_lists_what_each_command_says_of_itself(name: str) -> None:
    """It reads their source and imports none of them; asked for alone, they are imported."""

    def short(*words: str) -> str:
        return typer.main.get_command(assemble(words)).commands[name].get_short_help_str(300)

    (alone,) = typer.main.get_command(assemble([name])).commands
    assert alone == name
    assert short() == short("--version") == short(name, "--help") != ""


def test_no_words_show_the_help_with_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "expunge.cli"], capture_output=True, text=True, check=True)
    for command in HOMES:
        assert command in done.stdout
    assert done.stderr == ""
