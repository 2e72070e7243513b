"""compressed-tensors' `marlin-24`: 2:4 weights with 4- or 8-bit codes in the order of the Sparse-Marlin GPU kernel.

    weight_packed  int32 [K / 32, N * bits / 2]   the kept codes u = q + 2^(bits - 1)
    scale_packed   fp16 [G, N]                    G = K / 128, or 1
    meta           int16 [K / 32, 2 N]            positions of the kept columns, four quads of four in each

All three are permuted so that a warp loads what it needs. Derived from how it computes:

Codes. The kept codes [K / 2, N] are cut into tiles of 16 along K by 64 along N. Lane l of the warp needs, of a product
m16n8k16 (PTX, fragments of mma), the rows 2t, 2t + 1, 2t + 8, 2t + 9 with t = l % 4, for columns 8 (l / 4) + 0..7. It
takes columns j and j + 4 (j = 0..3) together: eight codes, a word for 4 bits. Inside a word 4-bit codes are interleaved
as 0, 2, 4, 6, 1, 3, 5, 7 and 8-bit ones as 0, 2, 1, 3, so that the even ones come out by one mask.

Scales of groups follow their columns: j and j + 4 side by side. One scale per row is not permuted.

Positions. CUTLASS (reorder_meta, layout ColumnMajorInterleaved<2>) keeps a 16-bit element, the positions of 16 columns
of one row of W, by the bits of its row r = ...r6 r5 r4 r3 r2 r1 r0 and column c = ...c1 c0 at
    (c >> 1) * 2 N + 2 * (64 * (r >> 6) + 32 r1 + 4 * (r5 r4 r3) + 2 r0 + c0) + r2
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.checkpoints.codes import unpack
from llmkern.checkpoints.scheme import BadTensor, Layer, Part, Scheme, check_parts, check_scales
from llmkern.formats import Sparse24Int4Weight, Sparse24Weight
from llmkern.formats.int4 import pack_words

TILE_K, TILE_N = 16, 64
INTERLEAVED = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
SCALES = (0, 4, 1, 5, 2, 6, 3, 7)


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a layer [N, K]."""
    n, k = shape
    if n % TILE_N or k % (2 * TILE_K):
        raise BadTensor("weight_packed", f"needs N to be a multiple of {TILE_N} and K of 32, got N={n}, K={k}")
    return {
        "weight_packed": Part((torch.int32,), ((k // 32, n * scheme.bits // 2),)),
        "scale_packed": Part((torch.float16,), ((scheme.groups(k), n),)),
        "meta": Part((torch.int16,), ((k // 32, 2 * n),)),
    }


def read(scheme: Scheme, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Layer:
    """The packed layer, exact: the same codes, positions and scales."""
    (n, k), bits = shape, scheme.bits
    check_parts(layout(scheme, shape), tensors)
    check_scales("scale_packed", tensors["scale_packed"])
    kept = _codes(tensors["weight_packed"], n, k, bits)
    scales = tensors["scale_packed"]
    if scales.shape[0] > 1:
        scales = scales.view(-1, n // 8, 8)[..., torch.tensor(SCALES).argsort()].flatten(1)
    positions = tensors["meta"].contiguous().flatten()[_places(n, k, scales.device)].view(n, -1).view(torch.uint8)
    pairs = torch.stack([positions & 15, positions >> 4], -1)
    if bool((bad := (pairs & 3) >= (pairs >> 2)).any()):
        row, byte, half = (int(i) for i in bad.nonzero()[0])
        got = int(pairs[row, byte, half])
        raise BadTensor(
            "meta", f"must keep two columns of each four, ascending, got {got & 3} and {got >> 2} in row {row}, "
            f"columns {8 * byte + 4 * half}..{8 * byte + 4 * half + 3}"
        )  # fmt: skip
    found = {"positions": positions, "scales": scales.T.contiguous()}
    group_size = min(scheme.group_size or k, k)
    if bits == 4:
        words = {**found, "words": pack_words(kept)}
        return Layer(Sparse24Int4Weight.from_tensors(words, shape=shape, group_size=group_size), None)
    return Layer(Sparse24Weight.from_tensors({**found, "values": kept}, shape=shape, group_size=group_size), None)


def _codes(words: Tensor, n: int, k: int, bits: int) -> Tensor:
    """The kept codes int8 [N, K / 2]."""
    tile = TILE_K * TILE_N
    stored = unpack(words, bits, n * TILE_K).reshape(k // 32, n // TILE_N, tile)
    row, column = _tile(bits)
    codes = torch.empty_like(stored)
    codes[..., (column * TILE_K + row).to(words.device)] = stored
    return codes.view(k // 32, n, TILE_K).transpose(0, 1).reshape(n, k // 2)


def _tile(bits: int) -> tuple[Tensor, Tensor]:
    """The row along K and the column along N, inside its tile, of each stored code."""
    inside = torch.tensor(INTERLEAVED[bits])
    at = (torch.arange(TILE_K * TILE_N).view(-1, len(inside)) // len(inside) * len(inside) + inside).flatten()
    lane, pair, upper, four = at // 32, at // 8 % 4, at // 4 % 2, at % 4
    row = 2 * (lane % 4) + four % 2 + 8 * (four // 2)
    return row, 8 * (lane // 4) + 4 * upper + pair


def _places(n: int, k: int, device: torch.device) -> Tensor:
    """Where the element of row r and 16 columns c is among the stored ones, [N, K / 16] flattened."""
    r = torch.arange(n, device=device)[:, None]
    c = torch.arange(k // 16, device=device)
    row = 64 * (r >> 6) + 32 * (r >> 1 & 1) + 4 * (r >> 3 & 7) + 2 * (r & 1) + (c & 1)
    return ((c >> 1) * 2 * n + 2 * row + (r >> 2 & 1)).flatten()
