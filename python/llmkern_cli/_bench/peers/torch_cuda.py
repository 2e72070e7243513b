"""torch's own products with int4 and int8 weights on a GPU: tinygemm, and cuBLASLt's int8 product.

torch has no op that quantizes activations and multiplies, so its int8 product stands here twice: with plain torch
around it that does what int8_dynamic_linear does, and alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmkern_cli._bench.candidate import GIVEN, PER_ROW
from llmkern_cli._bench.peers import Peer
from llmkern_cli._bench.weights import Rolled, Weights

INNER_TILES = 8  # of tinygemm's layout: 16 columns each
LEAST_ROWS = 32  # _int_mm takes more than 16 rows; fewer are padded, as torchao does
INT8_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Layer4 = tuple[Tensor, int, Tensor]
Layer8 = tuple[Tensor, Tensor]


def _refuses4(weights: Weights) -> str | None:
    (n, k), g = weights.shape, weights.group_size
    if g not in (32, 64, 128, 256) or n % 8 or k % (16 * INNER_TILES):
        return f"takes groups of 32 to 256, N % 8 == 0 and K % {16 * INNER_TILES} == 0, got {n}x{k} in groups of {g}"
    return None


def _build4(weights: Rolled, dtype: torch.dtype) -> Layer4:
    codes = (weights.codes4 + 8).to(torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], INNER_TILES)
    scales = weights.scales4.to(dtype)
    grid = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return words, weights.group_size, grid


def _bind4(layer: Layer4, x: Tensor) -> Callable[[], Tensor]:
    run, (words, group_size, grid) = torch.ops.aten._weight_int4pack_mm.default, layer
    return lambda: run(x, words, group_size, grid)


def _refuses8(weights: Weights) -> str | None:
    n, k = weights.shape
    return f"takes N % 8 == 0 and K % 8 == 0, got {n}x{k}" if n % 8 or k % 8 else None


def _build8(weights: Rolled, dtype: torch.dtype) -> Layer8:
    return weights.codes8, weights.scales8


def _scales(x: Tensor) -> Tensor:
    return x.abs().amax(1, keepdim=True).float() / 127


def _bind8(layer: Layer8, x: Tensor) -> Callable[[], Tensor]:
    codes, scales = layer
    m, columns = len(x), codes.t()
    rows = torch.zeros(max(m, LEAST_ROWS), x.shape[1], dtype=torch.int8, device=x.device)

    def call() -> Tensor:
        x_scales = _scales(x)
        rows[:m] = torch.round(x / x_scales)
        return (torch._int_mm(rows, columns)[:m] * x_scales * scales).to(x.dtype)

    return call


def _bind_given(layer: Layer8, x: Tensor) -> Callable[[], Tensor]:
    rows = pad(torch.round(x / _scales(x)).to(torch.int8), (0, 0, 0, max(0, LEAST_ROWS - len(x))))
    columns = layer[0].t()
    return lambda: torch._int_mm(rows, columns)


def _finish(product: Tensor, layer: Layer8, x: Tensor) -> Tensor:
    return product[: len(x)] * _scales(x) * layer[1]


PEERS = (
    Peer(
        "torch._weight_int4pack_mm", "int4_linear", _build4, _bind4, dtypes=(torch.bfloat16,), refuses=_refuses4,
        devices=("cuda",),
    ),
    Peer(
        "torch._int_mm, quantized in torch", "int8_dynamic_linear", _build8, _bind8, PER_ROW, INT8_DTYPES,
        refuses=_refuses8, devices=("cuda",),
    ),
    Peer(
        "torch._int_mm alone", "int8_dynamic_linear", _build8, _bind_given, GIVEN, INT8_DTYPES, refuses=_refuses8,
        devices=("cuda",), finish=_finish,
    ),
)  # fmt: skip
