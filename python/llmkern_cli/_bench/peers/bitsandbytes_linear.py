"""bitsandbytes on a GPU: NF4 in blocks of 64 with activations kept, and LLM.int8() without outliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import KEPT, PER_ROW
from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled

BLOCK = 64
DTYPES = (torch.bfloat16, torch.float16)


def _build4(weights: Rolled, dtype: torch.dtype) -> tuple[Tensor, Any]:
    from bitsandbytes import functional

    return functional.quantize_4bit(weights.dense.to(dtype).contiguous(), blocksize=BLOCK, quant_type="nf4")


def _bind4(layer: tuple[Tensor, Any], x: Tensor) -> Callable[[], Tensor]:
    import bitsandbytes

    codes, state = layer
    run, columns = bitsandbytes.matmul_4bit, codes.t()
    return lambda: run(x, columns, quant_state=state)


def _exact4(layer: tuple[Tensor, Any]) -> Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(*layer).float()


def _build8(weights: Rolled, dtype: torch.dtype) -> Any:
    import bitsandbytes

    state = bitsandbytes.MatmulLtState()
    state.has_fp16_weights, state.threshold = False, 0.0
    state.CB, state.SCB = weights.codes8, weights.scales8 * 127  # it stores the largest magnitude of a row
    return state


def _bind8(state: Any, x: Tensor) -> Callable[[], Tensor]:
    import bitsandbytes

    run, codes = bitsandbytes.matmul, state.CB
    return lambda: run(x, codes, state=state)


def _peer(name: str, op: str, build: Any, bind: Any, activations: str, **more: Any) -> Peer:
    return Peer(
        f"bitsandbytes.{name}", op, build, bind, activations, DTYPES, ("bitsandbytes",), whole_groups,
        devices=("cuda",), **more,
    )  # fmt: skip


PEERS = (
    _peer("nf4", "int4_linear", _build4, _bind4, KEPT, group_size=BLOCK, exact=_exact4),
    _peer("int8", "int8_dynamic_linear", _build8, _bind8, PER_ROW),
)
