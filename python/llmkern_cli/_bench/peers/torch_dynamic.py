"""torch's dynamic quantized linear on the onednn engine: activations to uint8, one scale for all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import PER_ROW
from llmkern_cli._bench.peers import Peer
from llmkern_cli._bench.weights import Rolled, Weights


def _refuses(weights: Weights) -> str | None:
    known = torch.backends.quantized.supported_engines
    return None if "onednn" in known else f"torch has no onednn engine here: {', '.join(known)}"


def _build(weights: Rolled, dtype: torch.dtype) -> Any:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        scales = weights.scales8.double()
        codes = torch._make_per_channel_quantized_tensor(weights.codes8, scales, torch.zeros_like(scales).long(), 0)
        return torch.ops.quantized.linear_prepack(codes, None)
    finally:
        torch.backends.quantized.engine = before


def _bind(layer: Any, x: Tensor) -> Callable[[], Tensor]:
    run = torch.ops.quantized.linear_dynamic.default
    return lambda: run(x, layer)


PEERS = (
    Peer(
        "torch.quantized.linear_dynamic", "int8_dynamic_linear", _build, _bind, PER_ROW, (torch.float32,),
        refuses=_refuses,
    ),
)  # fmt: skip
