"""Gradient checkpointing that knows views: a block is run again with the weights and hooks it was first run with."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from expunge.core.errors import InputError

Installed = Sequence[tuple[nn.Module, Any]]


def replayed(block: nn.Module, *inputs: Any) -> Any:
    """Run a block, forget its activations, and compute them again when its gradient is asked for.

    By then the view that called it has taken its weights back and removed its hooks, so torch's own checkpointing would
    run the base network again, and say nothing. Here the block keeps what it saw: references, not copies. So for modes
    of torch, which it takes off for the time of a backward pass. Meant for diffusers' `enable_gradient_checkpointing`.
    """
    weights = dict(block.named_parameters())
    hooks = [(module, hook) for module in block.modules() for hook in module._forward_hooks.values()]
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]

    def run(*again: Any) -> Any:
        with _present(hooks), _under(modes):
            return functional_call(block, weights, again)

    return checkpoint(run, *inputs, use_reentrant=False)


def recomputing(network: nn.Module) -> tuple[nn.Module, ...]:
    """List the modules that can be told to compute their activations again."""
    return tuple(module for module in network.modules() if hasattr(module, "gradient_checkpointing"))


def check_replayed(blocks: Sequence[nn.Module], name: str) -> None:
    """Raise InputError for blocks that recompute by other means: gradients through a view would be the base's."""
    for module in blocks:
        if module.gradient_checkpointing and module._gradient_checkpointing_func is not replayed:
            raise InputError(
                f"{name!r} was told to recompute activations in a way that forgets views; open it by "
                "load(..., checkpointing=True)"
            )


@contextmanager
def _present(hooks: Installed) -> Iterator[None]:
    """Install the hooks that are not: none in the first run, all of the view's in the second."""
    there = {(id(module), id(hook)) for module, _ in hooks for hook in module._forward_hooks.values()}
    absent = [(module, hook) for module, hook in hooks if (id(module), id(hook)) not in there]
    handles = [module.register_forward_hook(hook) for module, hook in absent]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _under(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Enter the modes that are off."""
    on = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        for mode in modes:
            if not any(mode is other for other in on):
                stack.enter_context(mode)
        yield
