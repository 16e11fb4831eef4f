"""A resting model on a device of its own: python tests/ops/other_device.py MODEL [PART]

There is no second device on most machines, so one is made up: torch's name for foreign backends, and fake tensors,
which have a device and no numbers and refuse operations across devices. Prompts are encoded, a student's loss is sent
back, latents are decoded; printed are the devices of what each of them gives. PART is left asleep when it is asked. A
process of its own, as a backend is registered once and for all.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from expunge.core.generator import State
from expunge.models._base import Adapter
from expunge.models.load import load
from expunge.ops.student import Student

ELSEWHERE = "elsewhere"


def replaced(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module.to` does, by new parameters: torch cannot exchange the data of fake ones."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = change(buffer)
    return module


def sleepy(part: str) -> Callable[..., Any]:
    """`_awake`, but for one part."""
    awake = Adapter._awake

    @contextmanager
    def woken(self: Adapter, asked: str) -> Iterator[None]:
        with nullcontext() if asked == part else awake(self, asked):
            yield

    return woken


def main(name: str, part: str = "") -> None:
    _setup_privateuseone_for_python_backend(ELSEWHERE)
    nn.Module._apply = replaced  # type: ignore[assignment,method-assign]
    Adapter._awake = sleepy(part)  # type: ignore[method-assign]
    model: Any = load(name, offload=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants that code makes on its way
    for module in model.network.values():
        replaced(module, mode.from_tensor)
    with mode:
        for active in set(model.network) - model.resting:
            model.network[active].to(ELSEWHERE)
        model._base = dict(model.network.named_parameters())
        cond = model.encode(["a red cat"])
        state = State(x=torch.zeros(1, *model.latent).to(ELSEWHERE), t=torch.full((1,), 0.5).to(ELSEWHERE))
        student = Student.of(model, "cross_attention")
        said = student.view().predict(state, cond)
        model.distance(said, torch.zeros_like(said)).mean().backward()
        image = model.decode(state.x)
    found = [cond.tokens.device, said.device, image.device, *{p.grad.device for p in student.parameters}]
    rest = {tensor.device.type for each in model.resting for tensor in model.network[each].parameters()}
    print(*(device.type for device in found), "and", *rest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
