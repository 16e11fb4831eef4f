"""Weight files written tensor by tensor: a checkpoint of many gigabytes is never in memory twice."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.core.errors import InputError
from expunge.stages._files import sync_folder, temporary

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write one .safetensors file whole or not at all and return its size; equal content gives equal bytes.

    Tensors are asked for one at a time, twice each, and not kept: a mapping may make them then.
    Raises InputError if the file exists or a tensor's type has no code, OSError if the disk is full.
    """
    refuse_existing(path)
    names, head = _laid_out(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        with part.open("wb") as stream:
            stream.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                stream.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        refuse_existing(path)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    return path.stat().st_size


def size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Give the bytes of the file that `write` would write; no numbers are needed, tensors may be on the meta device."""
    _, head = _laid_out(tensors, metadata)
    return 8 + len(head) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def refuse_existing(path: Path) -> None:
    """Raise InputError if there is anything at a path."""
    if path.exists():
        raise InputError(f"{path} exists already; nothing is overwritten")


@dataclass(frozen=True)
class _Fact:
    dtype: torch.dtype
    shape: torch.Size


def _fact(name: str, tensor: Tensor) -> _Fact:
    if tensor.dtype not in _CODES:
        raise InputError(f"tensor {name!r} is {tensor.dtype}; legal: {', '.join(map(str, _CODES))}")
    return _Fact(tensor.dtype, tensor.shape)


def _laid_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """The tensors' order in a file, and its header."""
    facts = {name: _fact(name, tensors[name]) for name in sorted(tensors)}
    names = sorted(facts, key=lambda name: -facts[name].dtype.itemsize)  # wide first keeps all aligned
    return names, _header({name: facts[name] for name in names}, metadata)


def _header(facts: Mapping[str, _Fact], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, fact in facts.items():
        start, end = end, end + fact.shape.numel() * fact.dtype.itemsize
        entries[name] = {"dtype": _CODES[fact.dtype], "shape": list(fact.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
