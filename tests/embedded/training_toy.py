"""A run of the embedded models' trainer that takes seconds: python -m training_toy FOLDER RANK PROCESSES [DIES]

Its loss walks paths as the distillation does; its net has weights in another order of memory, buffers, and a part that
stands still from a step on. DIES is "first" or "later" and "torn", "synced" or "renamed": where in which save it kills
itself.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import loop, paths

STEPS, SAVE, LOG = 60, 7, 3
RECIPE = {"steps": STEPS, "first": 0, "lr": 1e-2, "seed": 5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 16, 1))
        self.see.to(memory_format=torch.channels_last)
        self.read = nn.Embedding(8, 64)

    def forward(self, x: Tensor, captions: list[str]) -> Tensor:
        words = self.read(torch.tensor([len(caption) % 8 for caption in captions]))
        seen = self.see(x.reshape(-1, 16, 8, 8).contiguous(memory_format=torch.channels_last))
        return seen.reshape(-1, 16, 64) + words[:, None]


def learning(net: Net) -> tuple[Any, paths.Paths]:
    """Loss, and the paths that it remembers; short walks often."""
    paths.ROOM, paths.RARE = 512, 5

    def captions(random: torch.Generator) -> list[str]:
        return ["é" * int(n) for n in torch.randint(9, (2,), generator=random)]

    walked = paths.Paths(
        lambda x, t, said, scale: (scale * t)[:, None, None] - x, lambda x, t, said, scale: net(x, said), captions
    )

    def loss(step: int) -> Tensor:
        random = loop.rng(5, 1, step, loop.rank())
        net.read.requires_grad_(step < STEPS // 2)
        x, _, _, said, goal = walked.draw(4, random, step)
        return (net(x, said) - goal).pow(2).mean()

    return loss, walked


def train(folder: Path, recipe: loop.Recipe = RECIPE, until: int = 0) -> loop.Trainer:
    """Train to the end, or until a step after which nothing is saved any more."""
    torch.manual_seed(0)
    net = Net()
    loss, own = learning(net)
    trainer = loop.Trainer(net, folder, recipe, lr=1e-2, own=own)
    for step in trainer.run(loss, log_every=LOG, save_every=SAVE):
        if step % SAVE == 0:
            trainer.log(look=round(float(next(net.parameters()).detach().sum()), 6))
        if step == until:
            break
    return trainer


def deadly(which: str, place: str) -> None:
    """From now on, die in the first save of a step, or in the third."""
    left = {"first": 1, "later": 3}[which]
    save_file, sync, sync_folder = loop.save_file, os.fsync, loop.sync_folder

    def die(now: bool) -> None:
        if now and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        nonlocal left
        left -= 1
        save_file(tensors, file, metadata)
        if place == "torn" and left == 0:
            os.truncate(file, file.stat().st_size // 2)
        die(place == "torn")

    def synced(handle: int) -> None:
        sync(handle)
        die(place == "synced")

    def renamed(folder: Path) -> None:
        sync_folder(folder)
        die(place == "renamed")

    loop.save_file, loop.sync_folder, loop.os.fsync = save, renamed, synced


if __name__ == "__main__":
    number, processes = int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:]:
        deadly(*sys.argv[4:])
    loop.join(number, processes)
    train(Path(sys.argv[1]))
