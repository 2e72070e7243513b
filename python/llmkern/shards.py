"""Tensors as one safetensors file or several of bounded size with an index, as transformers names and reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmkern.weight_files import INDEX, WEIGHTS
from llmkern.weight_writer import Later, Sums, write

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as "5GB" (10^9), "200MiB" (2^20) or a number. ValueError for what is none, or below 1."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?B)?", size.strip().upper()) if isinstance(size, str) else None
    if match and (match[2] or "") in UNITS:
        size = int(float(match[1]) * UNITS[match[2] or ""])
    if type(size) is not int or size < 1:
        raise ValueError(f'save: max_shard_size must be bytes or such as "5GB" or "200MiB", got {size!r}')
    return size


def split(tensors: Mapping[str, Tensor | Later], most: int) -> list[dict[str, Tensor | Later]]:
    """The tensors in their order, in shards of at most `most` bytes; a larger tensor has a shard of its own."""
    shards: list[dict[str, Tensor | Later]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = nbytes(tensor)
        if shards[-1] and filled + size > most:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards


def nbytes(tensor: Tensor | Later) -> int:
    """Bytes of the tensor's values."""
    return tensor.shape.numel() * tensor.dtype.itemsize


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str], most: int
) -> dict[str, Sums]:
    """Write all tensors to `folder`, one in memory at a time; the checksums of each safetensors file by name.

    One file if they fit into it, else shards and their index. Errors as `weight_writer.write`.
    """
    shards = split(tensors, most)
    names = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    digests = {}
    for name, shard in zip(names, shards, strict=True):
        digests[name] = write(folder / name, shard, metadata)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(nbytes(tensor) for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return digests
