"""Safetensors headers, read without torch and without the tensors. Nothing in a file is believed unchecked."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

# The format's own limit.
MAX_HEADER = 100_000_000
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
        "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8}  # fmt: skip


class Stored(NamedTuple):
    """A tensor as its header describes it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files; with an index, of the files it names and only those."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index}: a file name with a folder in it: {name!r}")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no safetensors file there")
    tensors: dict[str, Stored] = {}
    for path in files:
        for name, stored in read_file(path).items():
            if name in tensors:
                raise ValueError(f"{path}: tensor {name!r} is in two files")
            tensors[name] = stored
    return tensors


def read_file(path: Path) -> dict[str, Stored]:
    """Name -> dtype, shape and bytes. Raises ValueError naming the file and what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: not a safetensors file: {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path}: not a safetensors file: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a safetensors file: the header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file: the header is no mapping")
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, size - 8 - length) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: Any, available: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = (*shape, begin, end)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: tensor {name!r}: a broken header entry") from None
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{path}: tensor {name!r}: a broken header entry")
    if not begin <= end <= available:
        raise ValueError(f"{path}: tensor {name!r} ends at byte {end} of {available}: the file is cut off")
    elements = 1
    for count in shape:
        elements *= count
    if dtype in BITS and elements * BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"{path}: tensor {name!r}: {dtype} {list(shape)} in {end - begin} bytes")
    return Stored(dtype, shape, end - begin)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted a mapping, got a {type(found).__name__}")
    return found
