"""SIGKILL at random moments: however often a training dies, the same command ends at the bits of an unbroken one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

BRIEF = {"batch": 1, "pool": 2, "walk": 3}
METHODS = {"esd": {**BRIEF, "steps": 120}, "score": {**BRIEF, "steps": 40, "pairs": 4, "refresh": 7, "turn": 1.0}}
OFTEN = """
import sys
from functools import partial
from expunge.cli.app import run
from expunge.stages import erase
erase.Training = partial(erase.Training, every=3)
sys.exit(run(sys.argv[1:]))
"""
"""The command line, with a state every third step in place of every fiftieth."""
KILLS = 4


def begun(method: str, out: Path) -> subprocess.Popen[str]:
    options = [word for name, value in METHODS[method].items() for word in ("--set", f"{name}={value}")]
    words = ["erase", "tiny-unet", "--target", "red", "--method", method, *options, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", OFTEN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def seconds_of(process: subprocess.Popen[str], out: Path) -> float:
    """Wait for a good end; gives the time since the training's first row."""
    first = time.monotonic()
    while process.poll() is None:
        if not (out / "training" / "log.jsonl").exists() and not (out / "artifact").exists():
            first = time.monotonic()
        time.sleep(0.01)
    took, (_, said) = time.monotonic() - first, process.communicate()
    assert process.returncode == 0, said
    return took


def killed(process: subprocess.Popen[str], out: Path, delay: float) -> bool:
    """Kill so many seconds after the training goes on, which may be in what follows it; False if all ended before."""
    log = out / "training" / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
        time.sleep(0.005)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_it_ends_at_the_same_bits(method: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, whole, out = random.Random(seed), tmp_path / "whole", tmp_path / "killed"
    span, deaths = seconds_of(begun(method, whole), whole), 0
    while deaths < KILLS and killed(begun(method, out), out, rng.uniform(0, span / 2)):
        deaths += 1
        left = sorted(file.name for file in out.rglob("*") if file.is_file())
        print(f"death {deaths}: {left}")
        assert sum(name.endswith(".part") for name in left) <= 1  # those of earlier deaths have been swept
    seconds_of(begun(method, out), out)
    assert deaths > 0
    one, two = (load_file(side / "artifact" / "patch.safetensors") for side in (whole, out))
    assert {name: t.numpy().tobytes() for name, t in one.items()} == {
        name: t.numpy().tobytes() for name, t in two.items()
    }
    assert (out / "artifact" / "log.jsonl").read_bytes() == (whole / "artifact" / "log.jsonl").read_bytes()
    assert not (out / "training").exists()
