"""Codes in 32-bit words, as other projects store them, into the layouts of `llmkern.formats`.

dense    as `formats.bit_words`
padded   32 // bits codes per word, the rest of the word 0 (compressed-tensors before 0.18)
awq      eight 4-bit codes per word along N, in the order 0, 2, 4, 6, 1, 3, 5, 7

A part of the rows is unpacked at a time, so that codes as bytes never exist for a whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmkern.checkpoints.scheme import BadTensor
from llmkern.formats.bit_words import unpack_codes
from llmkern.formats.int4 import pack_words

PART = 1 << 19  # codes that are unpacked at once
# Where column c of each eight is found among a word's nibbles: the inverse of the order 0, 2, 4, 6, 1, 3, 5, 7.
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


def padded_width(count: int, bits: int) -> int:
    """Words of a row of `count` codes, padded."""
    return -(-count // (32 // bits))


def unpack(words: Tensor, bits: int, count: int, word_layout: str | None = "dense") -> Tensor:
    """int32 [R, W] -> int8 [R, count]: q = u - 2^(bits - 1)."""
    if word_layout != "padded":
        return unpack_codes(words, bits, count)
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
    fields = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return (fields - 2 ** (bits - 1)).to(torch.int8).flatten(1)[:, :count]


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [R, W] -> int8 [R, 8 W], q = u - 8, columns in order."""
    nibbles = unpack_codes(words, 4, 8 * words.shape[1]).view(*words.shape, 8)
    return nibbles[..., list(AWQ_NIBBLE)].flatten(1)


def repack(
    read: Callable[[slice], Tensor], shape: tuple[int, int], bits: int, order: Tensor | None, like: Tensor,
    multiple: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """The codes of a layer as a packed weight has them, where `like` is: `words` for at most 4 bits, else `codes`.

    read: the codes int8 [rows, K] of a range of rows, which begins at a multiple of `multiple`; order: the
    stored column that each packed column is.
    """
    n, k = shape
    small = bits <= 4
    out = like.new_empty(n, -(-k // 8) if small else k, dtype=torch.int32 if small else torch.int8)
    for rows in parts(n, k, multiple):
        codes = read(rows)
        if order is not None:
            codes = codes[:, order]
        out[rows] = pack_words(codes) if small else codes
    return {"words" if small else "codes": out}


def parts(n: int, k: int, multiple: int = 1) -> Iterator[slice]:
    """All rows of a matrix [N, K] in ranges of about PART values."""
    step = max(PART // max(k, 1) // multiple, 1) * multiple
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def order_of(leaf: str, index: Tensor, group_size: int, k: int, groups: int) -> Tensor | None:
    """The order in which columns are sorted by their group: int32 [K]; None where they are already.

    index: the group of each column. BadTensor for a group that does not exist, or for groups that do not have
    `group_size` columns each (the last may be short).
    """
    index = index.to(torch.int64)
    if k and not (int(index.min()) >= 0 and int(index.max()) < groups):
        at = int(((index < 0) | (index >= groups)).nonzero()[0])
        raise BadTensor(leaf, f"must be in [0, {groups - 1}], got {int(index[at])} at [{at}]")
    wanted = torch.arange(k, device=index.device) // group_size
    if torch.equal(index, wanted):
        return None
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], wanted):
        counts = torch.bincount(index, minlength=groups)
        full = torch.bincount(wanted, minlength=groups)
        at = int((counts != full).nonzero()[0])
        raise BadTensor(leaf, f"must give group {at} {int(full[at])} columns, got {int(counts[at])}")
    return order.to(torch.int32)
