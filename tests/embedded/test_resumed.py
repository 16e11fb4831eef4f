"""A training of the embedded models, killed anywhere, ends at the bits of an unbroken one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_toy
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from training import clip, flux, keeping, lessons, loop, paths, release, text, unet
from training.flux_net import FluxNet, Words, levels
from training.loop import CHECKPOINT, LOG
from transformers import T5TokenizerFast

from expunge.core.errors import InputError

SAVE, STEPS, RECIPE = training_toy.SAVE, training_toy.STEPS, training_toy.RECIPE


def bits(folder: Path) -> tuple[dict[str, bytes], dict[str, str], list[dict[str, Any]]]:
    """Weights, average, moments and lessons; what the file says of itself; the log but for the clock."""
    with safe_open(folder / CHECKPOINT, framework="pt") as found:
        facts = dict(found.metadata())
    del facts["log"]  # its length hangs on the clock's digits
    rows = [json.loads(row) for row in (folder / LOG).read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    state = load_file(folder / CHECKPOINT)
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()}, facts, rows


def same(one: Path, two: Path) -> None:
    (a, told, rows), (b, other, lines) = bits(one), bits(two)
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []
    assert told == other
    assert rows == lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    training_toy.train(folder)
    return folder


@pytest.mark.parametrize("until", [1, SAVE, 2 * SAVE + 3, STEPS - 1, STEPS])
def test_left_at_any_step_and_taken_up_again(until: int, whole: Path, tmp_path: Path) -> None:
    training_toy.train(tmp_path, until=until)  # after the caller's look, before the save of that step
    assert bits(tmp_path)[0] != bits(whole)[0]
    trainer = training_toy.train(tmp_path)
    same(whole, tmp_path)
    assert all(
        kept.stride() == now.stride()
        for kept, now in zip(trainer.ema.values(), trainer.net.state_dict().values(), strict=True)
    )


def test_a_checkpoint_holds_all_that_is_needed(whole: Path) -> None:
    state, facts, rows = bits(whole)
    assert {name.partition(".")[0] for name in state} == {"net", "ema", "exp_avg", "exp_avg_sq", "adam", "own"}
    assert json.loads(facts["recipe"]) == RECIPE and facts["step"] == str(STEPS)
    adam = load_file(whole / CHECKPOINT)
    assert adam["adam.read.weight"] == STEPS // 2 < adam["adam.see.0.weight"] == STEPS  # as often as each was moved
    assert rows[0] == {"step": 0, "begins": True, **RECIPE}
    assert [row["step"] for row in rows if "look" in row] == list(range(SAVE, STEPS + 1, SAVE))


def test_another_recipe_is_refused_until_the_run_is_finished(tmp_path: Path) -> None:
    training_toy.train(tmp_path, until=SAVE + 1)
    before = bits(tmp_path)
    with pytest.raises(InputError, match=r"stands at step 7 of a run with seed=5, asked for seed=6: ask for the same"):
        training_toy.train(tmp_path, {**RECIPE, "seed": 6})
    with pytest.raises(InputError, match=r"with batch=None, steps=60, asked for batch=2, steps=90"):
        loop.standing(tmp_path, {**RECIPE, "steps": 90, "batch": 2})
    assert bits(tmp_path) == before
    training_toy.train(tmp_path)
    further = {**RECIPE, "steps": STEPS + 3, "first": STEPS}
    with pytest.raises(InputError, match="asked for first=61"):
        loop.standing(tmp_path, {**further, "first": STEPS + 1})
    training_toy.train(tmp_path, further)
    begun = [row for row in bits(tmp_path)[2] if "begins" in row]
    assert [row["step"] for row in begun] == [0, STEPS] and begun[1]["steps"] == STEPS + 3
    with pytest.raises(InputError, match=r"first=60, steps=63, asked for first=0, steps=60"):
        training_toy.train(tmp_path)


def test_a_torn_or_foreign_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    training_toy.train(tmp_path, until=SAVE + 1)
    file = tmp_path / CHECKPOINT
    good = file.read_bytes()
    plain = tmp_path / "plain.safetensors"
    loop.save({"x": torch.zeros(2)}, plain, {"step": 3})
    for bad in (good[:-1], good[:40], b"", b"\xff" * 200, plain.read_bytes()):
        file.write_bytes(bad)
        with pytest.raises(InputError, match="no checkpoint that can be read") as told:
            training_toy.train(tmp_path)
        assert "\n" not in str(told.value) and str(file) in str(told.value)
        assert file.read_bytes() == bad


def begun(folder: Path, processes: int, *dies: str) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here, "MASTER_PORT": str(port)}
    return [
        subprocess.Popen([sys.executable, "-m", "training_toy", str(folder), str(n), str(processes), *dies], env=env)
        for n in range(processes)
    ]


def ended(started: list[subprocess.Popen[bytes]]) -> None:
    assert [process.wait(120) for process in started] == [0] * len(started)


def kill(started: list[subprocess.Popen[bytes]]) -> bool:
    """Kill all; False if they had ended before."""
    alive = [process for process in started if process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGKILL)
    return [process.wait() for process in started].count(-signal.SIGKILL) > 0


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "later"])
@pytest.mark.parametrize("place", ["torn", "synced", "renamed"])
def test_killed_within_a_save(which: str, place: str, whole: Path, tmp_path: Path) -> None:
    (process,) = begun(tmp_path, 1, which, place)
    assert process.wait(60) == -signal.SIGKILL
    assert (tmp_path / CHECKPOINT).exists() == (which == "later" or place == "renamed")
    assert (tmp_path / "checkpoint.tmp").exists() == (place != "renamed")
    training_toy.train(tmp_path)
    same(whole, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CHECKPOINT, LOG]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(processes: int, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, one, two = random.Random(seed), tmp_path / "whole", tmp_path / "killed"
    started = begun(one, processes)
    while not (one / LOG).exists():
        time.sleep(0.005)
    first = time.monotonic()
    ended(started)
    span, deaths = time.monotonic() - first, 0
    for _ in range(2):
        before = (two / LOG).stat().st_mtime_ns if (two / LOG).exists() else 0
        started = begun(two, processes)
        while (not (two / LOG).exists() or (two / LOG).stat().st_mtime_ns == before) and started[0].poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, span / 2))
        deaths += kill(started)
        print(f"death {deaths}: {sorted(file.name for file in two.iterdir())}")
    ended(begun(two, processes))
    assert deaths > 0
    same(one, two)
    assert {name[4] for name in bits(one)[0] if name.startswith("own.")} == {str(n) for n in range(processes)}


class Mixture:
    """Latents out of nothing, in place of those of training.latents."""

    def draw(self, random: torch.Generator) -> tuple[Tensor, list[str]]:
        names = ("a cat", "a flat dog", "", "a violin on blue", "two ink cars")
        said = [names[int(i)] for i in torch.randint(len(names), (4,), generator=random)]
        return torch.randn(4, 16, 8, 8, generator=random), said


def distilled(folder: Path, until: int = 0) -> Path:
    """Distil a teacher of one dual and one single block for six steps, saving after two and four."""
    tokenizer = T5TokenizerFast.from_pretrained(release.EMBEDDED / flux.NAMES[False] / "tokenizer_2")
    torch.manual_seed(1)
    teacher, net = (FluxNet(len(tokenizer), distilled=d, blocks=(1, 1)) for d in (False, True))
    net.t5.requires_grad_(False)
    args = Namespace(batch=4, processes=1, seed=3)
    loss, own = flux.distillation(net, teacher.eval().requires_grad_(False), Words(tokenizer), Mixture(), args)
    recipe = {"steps": 6, "first": 0}
    trainer = loop.Trainer(net, folder, recipe, lr=1e-2, own=own)
    for step in trainer.run(loss, log_every=1, save_every=2):
        if step == until:
            break
    return folder


@pytest.mark.slow
def test_a_distillation_goes_on_with_the_very_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "ROOM", 200)  # of two walks; the third makes room
    monkeypatch.setattr(paths, "RARE", 2)
    one = distilled(tmp_path / "whole")
    assert len(bits(one)[0]["own.0.0"]) == 200 * 16 * 64 * 2
    two = distilled(distilled(tmp_path / "left", 3))
    same(one, two)
    # without its paths it would have walked others
    monkeypatch.setattr(paths.Paths, "restore", lambda self, tensors: None)
    three = distilled(distilled(tmp_path / "forgetful", 3))
    assert bits(one)[0] != bits(three)[0]


def bank() -> lessons.Bank:
    torch.manual_seed(2)
    return lessons.Bank(Mixture(), levels, unet.build().eval().requires_grad_(False))


def drawn(found: tuple[Any, ...]) -> list[Any]:
    return [part.tolist() if isinstance(part, Tensor) else part for part in found]


def test_a_bank_goes_on_with_the_very_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "ROOM", 9)
    one, two, fresh = bank(), bank(), bank()
    for step in range(6):
        one.draw(4, loop.rng(1, step))
    assert len(one.kept) == 9 and one.oldest > 0
    two.restore({name: tensor.clone() for name, tensor in one.tensors().items()})
    for step in range(6, 9):
        found = [drawn(side.draw(4, loop.rng(1, step))) for side in (one, two, fresh)]
        assert found[0] == found[1]
    assert found[0] != found[2] and two.oldest == one.oldest


def test_what_is_said_of_a_caption_hangs_on_no_other() -> None:
    one, two = text.Embedder(), text.Embedder()
    many = [f"a {style} picture of a cat" for style in ("flat", "ink", "3d", "sepia", "sticker")]
    states, pooled = one(many)
    for i in (3, 0):
        alone = two([many[i]])
        assert torch.equal(alone[0][0], states[i]) and torch.equal(alone[1][0], pooled[i])
    assert not torch.equal(states[0], states[3])


@pytest.mark.parametrize("family", ["flux", "clip"])
def test_a_tokenizer_is_learned_once_a_run(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "sentences", lambda cache: learned)
    monkeypatch.setattr(clip, "build", lambda tokenizer: tokenizer)
    args = Namespace(run=tmp_path, start=None, distil=False, cache=tmp_path)

    def numbers() -> dict[str, int]:
        if family == "clip":
            return clip.begin(args)[1].get_vocab()
        return T5TokenizerFast.from_pretrained(flux.tokenizer_of(args)).get_vocab()

    learned = ["a cat sat there"] * 9
    first = numbers()
    learned = ["zebras zigzag"] * 9
    (tmp_path / CHECKPOINT).touch()
    assert numbers() == first
    (tmp_path / CHECKPOINT).unlink()
    assert numbers() != first


def test_captions_come_back_from_bytes() -> None:
    said = ["", "a cat", "é" * 128]
    assert keeping.read(keeping.written(said)) == said
    assert keeping.unpacked(keeping.packed([])) == []
    with pytest.raises(InputError, match="a caption has 257 bytes; legal: at most 256"):
        keeping.written(["a" * 257])
