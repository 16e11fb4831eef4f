"""Weight files written tensor by tensor: a checkpoint of many gigabytes is never in memory twice."""

import json
import os
from collections.abc import Mapping
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

    Raises InputError if the file exists or a tensor's type has no code, OSError if the disk is full.
    """
    refuse_existing(path)
    names = _ordered(tensors)
    head = _header({name: tensors[name] for name in names}, metadata)
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
    head = _header({name: tensors[name] for name in _ordered(tensors)}, metadata)
    return 8 + len(head) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def refuse_existing(path: Path) -> None:
    """Raise InputError if there is anything at a path."""
    if path.exists():
        raise InputError(f"{path} exists already; nothing is overwritten")


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide first keeps all aligned


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise InputError(f"tensor {name!r} is {tensor.dtype}; legal: {', '.join(map(str, _CODES))}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
