"""A safetensors file written tensor by tensor, so that not all of them need to be in memory at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern._memory import raw

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Later(NamedTuple):
    """A tensor that is made, or read, when it is written."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]


class Sums(NamedTuple):
    """SHA-256 in hexadecimal: of a file, and of its beginning up to the end of the header."""

    whole: str
    header: str


def write(path: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str]) -> Sums:
    """Write the file: tensors of wide types first, so that each is aligned, then by name.

    Raises TypeError for a dtype that the format does not have, ValueError for a tensor without values (meta) or one
    that turns out to be another than was announced.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise TypeError(f"save: tensor {name}: a file cannot hold {tensor.dtype}")
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(f"save: tensor {name} has no values: it is on the meta device")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, NAMES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.shape.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    of_header = digest.hexdigest()
    with path.open("wb", buffering=0) as file:
        _write(file.write, head)
        for name in order:
            data = _bytes(name, tensors[name])
            digest.update(data)
            _write(file.write, data)
    return Sums(digest.hexdigest(), of_header)


def _bytes(name: str, tensor: Tensor | Later) -> memoryview:
    made = tensor if isinstance(tensor, Tensor) else tensor.make()
    if made.shape != tensor.shape or made.dtype != tensor.dtype:
        wanted, got = f"{tensor.dtype} {list(tensor.shape)}", f"{made.dtype} {list(made.shape)}"
        raise ValueError(f"save: tensor {name} must be {wanted}, got {got}")
    return raw(made.detach().cpu().contiguous())


def _write(put: Callable[[memoryview], int], data: bytes | memoryview) -> None:
    left = memoryview(data)
    while len(left):
        left = left[put(left) :]
