"""What every training run shares: random streams by step, checkpoints that survive a kill, a log, a learning rate."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


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


def save(tensors: dict[str, Tensor], path: Path, step: int) -> None:
    """Write tensors and step whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    save_file(
        {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        scratch,
        metadata={"step": str(step)},
    )
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


class Trainer:
    """AdamW with an exponential moving average, resumable from one safetensors file."""

    def __init__(
        self,
        net: nn.Module,
        folder: Path,
        *,
        lr: float,
        steps: int,
        first: int = 0,
        decay: float = 0.999,
        weight_decay: float = 0.01,
    ) -> None:
        """Resume from `folder/checkpoint.safetensors` when it is there, else begin at step `first`."""
        self.net, self.folder, self.lr, self.steps, self.decay = net, folder, lr, steps, decay
        self.first = first
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.ema = {name: p.detach().clone() for name, p in net.state_dict().items()}
        self.step = first
        self.began = time.monotonic()
        if self.file.exists():
            self._resume()

    @property
    def file(self) -> Path:
        """Where the checkpoint lies."""
        return self.folder / "checkpoint.safetensors"

    def _resume(self) -> None:
        state = load_file(self.file)
        self.net.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("net.")})
        self.ema = {k[4:]: v for k, v in state.items() if k.startswith("ema.")}
        self.step = int(state["step"])
        for name, p in self.net.named_parameters():
            moments = {m: state[f"{m}.{name}"] for m in ("exp_avg", "exp_avg_sq") if f"{m}.{name}" in state}
            if moments:
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step - self.first)), **moments}
        self._forget_what_was_lost()

    def _forget_what_was_lost(self) -> None:
        # rows after the checkpoint belong to steps that will be made again
        file = self.folder / "log.jsonl"
        if file.exists() and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            rows = [row for row in file.read_text().splitlines() if json.loads(row)["step"] <= self.step]
            file.write_text("".join(f"{row}\n" for row in rows))

    def checkpoint(self) -> None:
        """Write everything a resumed run needs."""
        state = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, p in self.net.named_parameters():
            state |= {f"{m}.{name}": v for m, v in self.optimizer.state.get(p, {}).items() if m != "step"}
        save({**state, "step": torch.tensor(self.step)}, self.file, self.step)

    def run(self, loss: Callable[[int], Tensor], *, log_every: int = 50, save_every: int = 500) -> Iterator[int]:
        """Train to the end; yields the step number after each update so that the caller can look."""
        mean, synced = 0.0, torch.distributed.is_initialized()
        leader = not synced or torch.distributed.get_rank() == 0
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * cosine(self.step - self.first, self.steps - self.first)
            self.optimizer.zero_grad(set_to_none=True)
            value = loss(self.step)
            value.backward()
            if synced:
                average_gradients(self.net)
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self._average()
            mean = value.item() if mean == 0 else 0.98 * mean + 0.02 * value.item()
            if leader and self.step % log_every == 0:
                self.log(loss=round(mean, 5), lr=self.optimizer.param_groups[0]["lr"])
            if leader and (self.step % save_every == 0 or self.step == self.steps):
                self.checkpoint()
            yield self.step

    def _average(self) -> None:
        made = self.step - self.first
        rate = min(self.decay, (1 + made) / (10 + made))
        current = self.net.state_dict()
        for name, kept in self.ema.items():
            if kept.dtype.is_floating_point:
                kept.lerp_(current[name], 1 - rate)
            else:
                kept.copy_(current[name])

    def log(self, **values: float | str | None) -> None:
        """Append one row to the run's log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"step": self.step, "seconds": round(time.monotonic() - self.began, 1), **values}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


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
