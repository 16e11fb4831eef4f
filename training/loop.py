"""What every training run shares: random streams by step, checkpoints that survive a kill, a log, a learning rate."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.stages._files import sync_folder

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
Recipe = Mapping[str, int | float | str | None]
"""What a run was asked for: every option that its numbers depend on, `steps` and `first` among them."""


class Own(Protocol):
    """What a loss remembers from step to step, in each process for itself; of equal shapes in all."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it remembers."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember that, and nothing else."""


def rng(seed: int, *name: int) -> torch.Generator:
    """Random stream that depends on its name only, so that a resumed run draws what an unbroken one would."""
    mixed = seed
    for part in name:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(mixed)


def cosine(step: int, steps: int, *, warmup: int = 200, tail: float = 0.4) -> float:
    """Learning-rate factor: linear warm-up, constant, cosine to zero over the last `tail` of the run."""
    start = steps * (1 - tail)
    decay = 1.0 if step < start else 0.5 + 0.5 * math.cos(math.pi * (step - start) / (steps - start))
    return min(1.0, (step + 1) / warmup) * decay


def save(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, Any]) -> None:
    """Write tensors, and facts as JSON in the file's head, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    save_file(
        {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        scratch,
        metadata={name: json.dumps(fact) for name, fact in facts.items()},
    )
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def standing(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What the checkpoint in a folder says of itself; empty where there is none.

    Raises InputError for a file that cannot be read, and for a run of another recipe, unless that one is finished and
    `recipe` takes it further.
    """
    file = folder / CHECKPOINT
    if not file.exists():
        return {}
    try:
        with safe_open(file, framework="pt") as found:
            facts = {name: json.loads(fact) for name, fact in (found.metadata() or {}).items()}
        step, made = facts["step"], facts["recipe"]
    except (OSError, SafetensorError, KeyError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{file} is no checkpoint that can be read ({said}); remove it to start anew") from None
    further = step == made["steps"] < recipe["steps"] and recipe["first"] <= step
    if made != dict(recipe) and not further:
        names = [name for name in sorted({*made, *recipe}) if made.get(name) != recipe.get(name)]
        was, now = (", ".join(f"{name}={side.get(name)}" for name in names) for side in (made, recipe))
        raise InputError(
            f"{file} stands at step {step} of a run with {was}, asked for {now}: ask for the same, go further once it "
            "is finished, or remove it to start anew"
        )
    return facts


class Trainer:
    """AdamW with an exponential moving average, resumable from one safetensors file, bit by bit."""

    def __init__(
        self,
        net: nn.Module,
        folder: Path,
        recipe: Recipe,
        *,
        lr: float,
        decay: float = 0.999,
        weight_decay: float = 0.01,
        own: Own | None = None,
    ) -> None:
        """Go on from the checkpoint in `folder`, else begin at step `first` of the recipe, with a row in the log.

        A finished run is gone on with as a further stretch, with a row of its own. `own` is what the loss remembers.
        Raises InputError where `standing` does.
        """
        self.net, self.folder, self.recipe, self.lr, self.decay, self.own = net, folder, recipe, lr, decay, own
        self.step = self.first = int(recipe["first"] or 0)
        self.steps = int(recipe["steps"] or 0)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.ema = {name: p.detach().clone() for name, p in net.state_dict().items()}
        self.mean: float | None = None
        self.began = time.monotonic()
        found = standing(folder, recipe)
        if found:
            self._resume(found)
        if not found or found["recipe"] != dict(recipe):
            self.mean = None
            self.checkpoint()
        if self.mean is None:
            # no step of this stretch is made; the row lies behind what its checkpoint knows of the log
            self.log(begins=True, **recipe)

    def _resume(self, found: Mapping[str, Any]) -> None:
        state = load_file(self.folder / CHECKPOINT)
        self.net.load_state_dict(under(state, "net."))
        for name, kept in self.ema.items():
            kept.copy_(state[f"ema.{name}"])
        for name, p in self.net.named_parameters():
            # in the parameter's own order of memory, in which sums are taken
            adam = {m: state[f"{m}.{name}"] for m in ("exp_avg", "exp_avg_sq") if f"{m}.{name}" in state}
            if adam:
                moments = {m: torch.empty_like(p, requires_grad=False).copy_(value) for m, value in adam.items()}
                self.optimizer.state[p] = {"step": state[f"adam.{name}"], **moments}
        self.step, self.mean = found["step"], found["mean"]
        if self.own:
            self.own.restore(under(state, f"own.{rank()}."))
        if rank() == 0:
            self._forget_what_was_lost(found["log"])

    def _forget_what_was_lost(self, known: int) -> None:
        # bytes after the checkpoint are rows of steps that will be made again
        file = self.folder / LOG
        if file.exists() and file.stat().st_size > known:
            os.truncate(file, known)

    def checkpoint(self) -> None:
        """Write everything a resumed run needs; all processes must come here."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # at the beginning, nobody still looks whether there is one
        state = gathered(self.own.tensors()) if self.own else {}
        if rank() != 0:
            return
        state |= {f"net.{k}": v for k, v in self.net.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, p in self.net.named_parameters():
            adam = self.optimizer.state.get(p, {})
            state |= {f"{'adam' if m == 'step' else m}.{name}": v for m, v in adam.items()}
        log = self.folder / LOG
        known = log.stat().st_size if log.exists() else 0
        facts = {"step": self.step, "mean": self.mean, "log": known, "recipe": dict(self.recipe)}
        save(state, self.folder / CHECKPOINT, facts)

    def run(self, loss: Callable[[int], Tensor], *, log_every: int = 50, save_every: int = 500) -> Iterator[int]:
        """Train to the end; yields the step number after each update so that the caller can look.

        What the caller logs of a step is in the log that its checkpoint knows.
        """
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * cosine(self.step - self.first, self.steps - self.first)
            self.optimizer.zero_grad(set_to_none=True)
            value = loss(self.step)
            value.backward()
            if torch.distributed.is_initialized():
                average_gradients(self.net)
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self._average()
            self.mean = value.item() if self.mean is None else 0.98 * self.mean + 0.02 * value.item()
            if self.step % log_every == 0:
                self.log(loss=round(self.mean, 5), lr=self.optimizer.param_groups[0]["lr"])
            yield self.step
            if self.step % save_every == 0 or self.step == self.steps:
                self.checkpoint()

    def _average(self) -> None:
        made = self.step - self.first
        rate = min(self.decay, (1 + made) / (10 + made))
        current = self.net.state_dict()
        for name, kept in self.ema.items():
            if kept.dtype.is_floating_point:
                kept.lerp_(current[name], 1 - rate)
            else:
                kept.copy_(current[name])

    def log(self, **values: int | float | str | None) -> None:
        """Append one row to the run's log, which the first process keeps."""
        if rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"step": self.step, "seconds": round(time.monotonic() - self.began, 1), **values}
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(row) + "\n")


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without that."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def rank() -> int:
    """This process's number among those that train together."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each process holds, as own.RANK.NAME, in the first one; empty in others."""
    if not torch.distributed.is_initialized():
        return {f"own.0.{name}": tensor for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())] if rank() == 0 else None
        torch.distributed.gather(tensor, parts)
        found |= {f"own.{i}.{name}": part for i, part in enumerate(parts or [])}
    return found


def average_gradients(net: nn.Module) -> None:
    """Mean of every gradient over the processes, as one flat tensor."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    start = 0
    for g in grads:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


def join(rank: int, processes: int) -> None:
    """Make this process one of several that average their gradients, each on a core of its own."""
    quiet_cpu()
    if processes == 1:
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29411")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
    if hasattr(os, "sched_setaffinity"):
        # each step waits for the slowest: two processes on one core would halve the speed
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})


def mixed() -> torch.autocast:
    """bfloat16 matrix products where the processor has tiles for them; elsewhere float32 is the faster one."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())


def quiet_cpu() -> None:
    """One thread a process, denormals flushed, attention by plain matrix products: the fast way on a CPU."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.backends.cuda.enable_flash_sdp(False)
