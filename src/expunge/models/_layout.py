"""Names of an original layout as a table that is read in both directions: checkpoints are written and read by one."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Form = Literal["same", "transposed", "pointwise", "swapped"]


@dataclass(frozen=True)
class Entry:
    """One tensor of a one-file checkpoint: its name there, and what it is made of.

    The tensors at `paths` lie in it one below the other (fused queries, keys and values). form: "transposed", a
    matrix turned round; "pointwise", a matrix written as a 1 × 1 convolution; "swapped", its upper and lower half
    change places (diffusers has scale before shift, the original shift before scale). All of it is linear, so changes
    of weights are stored by the same table as weights.
    """

    name: str
    paths: tuple[str, ...]
    form: Form = "same"

    def stored(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Give the tensor as the original layout has it."""
        parts = [tensors[path].detach() for path in self.paths]
        return _turned(parts[0] if len(parts) == 1 else torch.cat(parts), self.form)

    def restored(self, stored: Tensor, rows: Mapping[str, int]) -> dict[str, Tensor]:
        """Give the tensors by path again; `rows` tells how many each has. Raises ValueError if they do not add up."""
        if self.form == "pointwise":
            return {self.paths[0]: stored[:, :, 0, 0] if stored.shape[2:] == (1, 1) else stored}
        whole = _turned(stored, self.form)
        sizes = [rows[path] for path in self.paths]
        if len(sizes) == 1:
            return {self.paths[0]: whole}
        if whole.ndim == 0 or sum(sizes) != whole.shape[0]:
            raise ValueError(f"{self.name!r} has shape {list(stored.shape)}, its parts have {sizes} rows")
        return dict(zip(self.paths, whole.split(sizes), strict=True))


@dataclass(frozen=True)
class Checkpoint(Mapping[str, Tensor]):
    """Tensors in the original layout, made when asked for: fused ones are copies, and a network has many."""

    entries: Mapping[str, Entry]
    tensors: Mapping[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].stored(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def fused(pieces: Iterable[tuple[str, int, str, Form]]) -> Iterator[Entry]:
    """Make entries of (original name, slot, path, form): pieces of one name are one tensor, in the slots' order."""
    found: dict[str, list[tuple[int, str, Form]]] = {}
    for name, slot, path, form in pieces:
        found.setdefault(name, []).append((slot, path, form))
    for name, parts in found.items():
        ordered = sorted(parts)
        yield Entry(name, tuple(path for _, path, _ in ordered), ordered[0][2])


def _turned(tensor: Tensor, form: Form) -> Tensor:
    """To the original's form; "transposed" and "swapped" undo themselves."""
    match form:
        case "transposed":
            return tensor.T
        case "pointwise":
            return tensor[:, :, None, None]
        case "swapped":
            return torch.cat(tensor.chunk(2)[::-1])
        case _:
            return tensor
