"""Signed codes of 2, 3, 4 or 8 bits in int32 words, without gaps: a code may begin in one word and end in the next.

The layout of compressed-tensors' `weight_packed` since 0.18 and, transposed, of GPTQ's `qweight`: u = q + 2^(bits-1),
least significant bit first, the first code lowest; bits after the last code are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.formats.int4 import pack_words
from llmkern.ops.int4_linear.reference import unpack_words

BITS = (2, 3, 4, 8)
RUN = 32  # codes that fill `bits` whole words


def width(k: int, bits: int) -> int:
    """Words of a row of k codes."""
    return -(-k * bits // 32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [N, K] in [-2^(bits-1), 2^(bits-1) - 1] -> int32 words [N, ceil(K * bits / 32)].

    ValueError for other bits, or a code that needs more of them.
    """
    _check_bits(bits)
    low = -(1 << (bits - 1))
    n, k = codes.shape
    if not codes.numel():
        return codes.new_empty(n, width(k, bits), dtype=torch.int32)
    if int(codes.min()) < low or int(codes.max()) >= -low:
        raise ValueError(
            f"codes of {bits} bits must be in [{low}, {-low - 1}], got {int(codes.min())} to {int(codes.max())}"
        )
    codes = _rows(codes)
    if bits == 4:
        return pack_words(codes)
    if bits == 8:
        return _pack_bytes(codes)
    words = codes.new_empty(n, width(k, bits), dtype=torch.int32)
    for rows in _base.row_parts(codes):
        unsigned = torch.nn.functional.pad(codes[rows].to(torch.int32) - low, (0, -k % RUN))
        runs = unsigned.view(len(unsigned), -1, RUN)
        out = torch.zeros(*runs.shape[:2], bits, dtype=torch.int32, device=codes.device)
        for at in range(RUN):
            word, shift = divmod(at * bits, 32)
            out[..., word] |= runs[..., at] << shift
            if shift + bits > 32:
                out[..., word + 1] |= runs[..., at] >> (32 - shift)
        words[rows] = out.flatten(1)[:, : words.shape[1]]
    return words


def unpack_codes(words: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of `pack_codes`, for any bits from 2 to 8: int8 codes [N, K].

    ValueError for other bits, and unless words are int32 [N, ceil(K * bits / 32)].
    """
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits!r}")
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != width(k, bits):
        raise ValueError(f"wanted int32 [N, {width(k, bits)}], got {words.dtype} {list(words.shape)}")
    if not words.numel():
        return words.new_empty(words.shape[0], k, dtype=torch.int8)
    words = _rows(words)
    if bits == 4:
        return unpack_words(words, k)
    if bits == 8:
        return (words.view(torch.uint8)[:, :k].to(torch.int16) - 128).to(torch.int8)
    codes = words.new_empty(words.shape[0], k, dtype=torch.int8)
    for rows in _base.row_parts(codes):
        runs = torch.nn.functional.pad(words[rows], (0, -words.shape[1] % bits))
        runs = runs.view(len(runs), -1, bits)
        out = torch.empty(*runs.shape[:2], RUN, dtype=torch.int8, device=words.device)
        for at in range(RUN):
            word, shift = divmod(at * bits, 32)
            # An arithmetic shift fills up with the sign, above the bits that count.
            u = (runs[..., word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
            if shift + bits > 32:
                u |= (runs[..., word + 1] << (32 - shift)) & ((1 << bits) - 1)
            out[..., at] = u - (1 << (bits - 1))
        codes[rows] = out.flatten(1)[:, :k]
    return codes


def _pack_bytes(codes: Tensor) -> Tensor:
    unsigned = torch.nn.functional.pad(codes.to(torch.int16) + 128, (0, -codes.shape[1] % 4)).to(torch.uint8)
    return unsigned.view(torch.int32)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with the strides of its shape: what torch calls contiguous may have others where a size is 1."""
    return matrix.reshape(-1).view(matrix.shape)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
