"""Several processes that train together, as `accelerate launch` starts them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor


@dataclass(frozen=True)
class Launched:
    """One of the processes; gradients are averaged by sums over all of them."""

    rank: int
    size: int

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their mean over all processes."""
        for tensor in tensors:
            tensor.div_(self.size)
            torch.distributed.all_reduce(tensor)


@contextmanager
def together(device: str) -> Iterator[Launched | None]:
    """Meet the other processes, and part from them at the end; None where this one was started alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    state = PartialState(cpu=device == "cpu")
    try:
        yield Launched(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()
