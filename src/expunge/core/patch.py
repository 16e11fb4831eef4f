"""What changes: the protocol of patches."""

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from expunge.core.generator import Generator


@runtime_checkable
class Patch(Protocol):
    """A frozen change that can be laid on a model, and stored."""

    kind: ClassVar[str]

    def on(self, model: Generator) -> Generator:
        """Give a view of the model with the change; stacks, `b.on(a.on(model))`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Give what is stored in patch.safetensors."""
        ...

    def meta(self) -> dict[str, Any]:
        """Give what else is needed to rebuild it, JSON-ready."""
        ...
