"""The header of a GGUF file: metadata, and each tensor's type, shape and place. Nothing in it is believed unchecked.

Layout: ggml's docs/gguf.md, versions 2 and 3, little endian; the sizes of a block per type are those of ggml-common.h.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

VERSIONS = (2, 3)
MAX_DIMS = 4  # ggml's own limit
MAX_STRING = 1 << 26  # bytes; a chat template has some thousands
ALIGNMENT = 32  # where the file names none

# Type number -> name, values in a block, bytes of a block. Q8_1 and Q8_K are for products only, never in files.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
# Metadata value types of a fixed size; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """One tensor: its type's name, its shape as torch counts it, its bytes, and where they start in the file."""

    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    block: tuple[int, int]  # values, bytes

    @property
    def bits(self) -> float:
        """Bits per value, the scales of a block included."""
        return self.block[1] * 8 / self.block[0]


class Header(NamedTuple):
    """metadata: numbers and strings as they are; of an array only its length."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """As llama.cpp names it: llama, qwen2, gemma3."""
        return self.metadata["general.architecture"]


def read(path: Path) -> Header:
    """The header. ValueError names the file and what is wrong: cut off, an unknown type, sizes that do not fit."""
    with path.open("rb") as file:
        reader = _Reader(path, file)
        if reader.take(4) != b"GGUF":
            raise reader.broken("it does not start with GGUF")
        version, tensor_count, key_count = reader.unpack("IQQ")
        if version not in VERSIONS:
            raise reader.broken(f"version {version}; known: {VERSIONS[0]} and {VERSIONS[1]}, little endian")
        metadata: dict[str, Any] = {}
        for _ in range(reader.count(key_count, 13)):
            key = reader.string()
            if key in metadata:
                raise reader.broken(f"the key {key!r} twice")
            metadata[key] = reader.value(reader.unpack("I")[0])
        _check_metadata(reader, metadata)
        table = [reader.entry() for _ in range(reader.count(tensor_count, 24))]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        start = -(-file.tell() // alignment) * alignment
    tensors = _placed(reader, table, start, alignment)
    blocks = metadata.get(f"{metadata['general.architecture']}.block_count", 0)
    if not isinstance(blocks, int) or blocks > len(tensors):
        raise reader.broken(f"a block_count of {blocks!r} with {len(tensors)} tensors")
    return Header(path, version, metadata, tensors)


def _check_metadata(reader: _Reader, metadata: dict[str, Any]) -> None:
    if not isinstance(metadata.get("general.architecture"), str):
        raise reader.broken("no general.architecture")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise reader.broken(f"general.alignment must be a power of two, got {alignment!r}")


def _placed(
    reader: _Reader, table: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, Tensor]:
    """The tensors of the table, whose data begin at `start`; they must lie in the file, apart from one another."""
    tensors: dict[str, Tensor] = {}
    for name, shape, number, offset in table:
        if number not in TYPES:
            raise reader.broken(f"tensor {name!r}: unknown type {number}")
        kind, values, size = TYPES[number]
        if shape[-1] % values:
            raise reader.broken(f"tensor {name!r}: {kind} {list(shape)}: rows are not whole blocks of {values}")
        nbytes, begin = math.prod(shape) // values * size, start + offset
        if offset % alignment:
            raise reader.broken(f"tensor {name!r}: its offset {offset} is not a multiple of {alignment}")
        if begin + nbytes > reader.size:
            raise reader.broken(f"tensor {name!r} ends at byte {begin + nbytes} of {reader.size}: the file is cut off")
        if name in tensors:
            raise reader.broken(f"tensor {name!r} twice")
        tensors[name] = Tensor(kind, shape, nbytes, begin, (values, size))
    end, last = start, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise reader.broken(f"tensors {last!r} and {name!r} overlap")
        end, last = tensor.offset + tensor.nbytes, name
    return tensors


class _Reader:
    """Values of a file, each checked to be in it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: not a GGUF file that can be read: {why}")

    def take(self, size: int) -> bytes:
        found = self.file.read(size) if size <= self.size - self.file.tell() else b""
        if len(found) < size:
            raise self.broken(f"it ends inside its header, at byte {self.size}")
        return found

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def count(self, number: int, least: int) -> int:
        """A number of things of at least so many bytes each, which must fit the rest of the file."""
        if number * least > self.size - self.file.tell():
            raise self.broken(f"a count of {number} in a file of {self.size} bytes")
        return number

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if length > MAX_STRING:
            raise self.broken(f"a text of {length} bytes in its header")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.broken(f"a text that is not UTF-8 before byte {self.file.tell()}") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind != ARRAY:
            raise self.broken(f"a metadata value of the unknown type {kind}")
        inner, length = self.unpack("IQ")
        if inner == STRING:
            for _ in range(self.count(length, 8)):
                self.string()
        elif inner in SCALARS:
            self.take(self.count(length, 1) * struct.calcsize(f"<{SCALARS[inner]}"))
        else:
            raise self.broken(f"a metadata array of the unknown type {inner}")
        return length

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, type number, and offset from the start of the data."""
        name = self.string()
        (dims,) = self.unpack("I")
        if not 1 <= dims <= MAX_DIMS:
            raise self.broken(f"tensor {name!r}: {dims} dimensions; wanted 1 to {MAX_DIMS}")
        *shape, number, offset = self.unpack(f"{dims}QIQ")
        return name, tuple(reversed(shape)), number, offset
