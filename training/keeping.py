"""Lessons as tensors, for a checkpoint and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import InputError

LINE = 256  # bytes of a caption; one width, so that all processes hold equal shapes


def packed(lessons: Sequence[tuple[Tensor | str, ...]]) -> dict[str, Tensor]:
    """Columns of lessons, stacked; captions as UTF-8 bytes filled up with zeros. Raises InputError for a long one."""
    columns = enumerate(zip(*lessons, strict=True))
    return {str(i): written(c) if isinstance(c[0], str) else torch.stack(c) for i, c in columns}


def unpacked(columns: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """Lessons out of their columns."""
    parts = [columns[str(i)] for i in range(len(columns))]
    return list(zip(*(read(c) if c.dtype == torch.uint8 else c.unbind() for c in parts), strict=True))


def written(captions: Sequence[str]) -> Tensor:
    """Captions as bytes "n LINE"."""
    lines = [caption.encode() for caption in captions]
    for line in lines:
        if len(line) > LINE:
            raise InputError(f"a caption has {len(line)} bytes; legal: at most {LINE}: {line.decode()!r}")
    return torch.frombuffer(bytearray(b"".join(line.ljust(LINE, b"\0") for line in lines)), dtype=torch.uint8).view(
        -1, LINE
    )


def read(lines: Tensor) -> list[str]:
    """The captions again."""
    return [bytes(line).rstrip(b"\0").decode() for line in lines.numpy()]
