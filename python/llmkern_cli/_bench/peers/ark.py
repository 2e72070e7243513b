"""ARK, the kernels of Intel's auto-round (auto-round-lib): activations kept, or int8 per weight group.

x in fp32 only, as its own layer does on a CPU: with bf16 it corrupted the heap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import KEPT, PER_GROUP, PER_ROW
from llmkern_cli._bench.peers import Peer, no_refusal, whole_groups
from llmkern_cli._bench.weights import Rolled

MOST_COPIES = 200


def _build(weights: Rolled, dtype: torch.dtype, bits: int, kept: bool) -> tuple[Tensor, tuple[Any, ...]]:
    import auto_round_kernel as ark

    (n, k), g = weights.shape, weights.group_size if bits == 4 else weights.shape[1]
    codes = weights.codes4 if bits == 4 else weights.codes8
    scales = weights.scales4 if bits == 4 else weights.scales8[:, None]
    kind = (g, "fp32" if kept else "int8", f"int{bits}", "fp32", False)
    zeros = torch.zeros(k // g, n, dtype=torch.int8)
    blob = ark.repack_quantized_weight(codes.T.contiguous(), scales.T.contiguous(), zeros, *kind)
    return blob, (n, k, *kind)


def _bind(layer: tuple[Tensor, tuple[Any, ...]], x: Tensor) -> Callable[[], Tensor]:
    import auto_round_kernel as ark

    blob, kind = layer
    bias, y, run = torch.empty(0, dtype=x.dtype), x.new_empty(len(x), kind[0]), ark.woqgemm
    return lambda: run(x, blob, bias, *kind, out=y)


def _peer(bits: int, activations: str) -> Peer:
    kept = activations == KEPT
    op = "int4_linear" if bits == 4 else "int8_linear" if kept else "int8_dynamic_linear"
    return Peer(
        f"ark.int{bits}.{'kept' if kept else 'int8'}", op, functools.partial(_build, bits=bits, kept=kept), _bind,
        activations, (torch.float32,), ("auto_round_kernel",),
        whole_groups if bits == 4 else no_refusal, MOST_COPIES,
    )  # fmt: skip


PEERS = (_peer(4, KEPT), _peer(4, PER_GROUP), _peer(8, KEPT), _peer(8, PER_ROW))
