"""torch's products with packed int4 and int8 weights, which are vectorized for bf16 only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled, Weights


def _refuses4(weights: Weights) -> str | None:
    if weights.group_size not in (32, 64, 128, 256):
        return f"takes groups of 32, 64, 128 or 256, got {weights.group_size}"
    return whole_groups(weights)


def _build4(weights: Rolled, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weights.codes4.int() + 8, 1)
    scales = weights.scales4.to(dtype)
    grid = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return words, weights.group_size, grid


def _bind4(layer: tuple[Tensor, int, Tensor], x: Tensor) -> Callable[[], Tensor]:
    run, (words, group_size, grid) = torch.ops.aten._weight_int4pack_mm_for_cpu.default, layer
    return lambda: run(x, words, group_size, grid)


def _build8(weights: Rolled, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weights.codes8, weights.scales8.to(dtype)


def _bind8(layer: tuple[Tensor, Tensor], x: Tensor) -> Callable[[], Tensor]:
    run, (codes, scales) = torch.ops.aten._weight_int8pack_mm.default, layer
    return lambda: run(x, codes, scales)


PEERS = (
    Peer(
        "torch._weight_int4pack_mm_for_cpu", "int4_linear", _build4, _bind4, dtypes=(torch.bfloat16,),
        refuses=_refuses4,
    ),
    Peer(
        "torch._weight_int8pack_mm", "int8_linear", _build8, _bind8, dtypes=(torch.bfloat16,),
        devices=("cpu", "cuda"),
    ),
)  # fmt: skip
