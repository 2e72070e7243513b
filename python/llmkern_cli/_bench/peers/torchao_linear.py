"""torchao's quantized linear layers on a GPU; each rounds the weight itself, so each is checked against its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmkern_cli._bench.candidate import KEPT, PER_ROW
from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled

DTYPES = (torch.bfloat16, torch.float16)


def _build(weights: Rolled, dtype: torch.dtype, config: str) -> nn.Linear:
    from torchao import quantization

    n, k = weights.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(weights.dense.to(dtype), requires_grad=False)
    options = {"group_size": weights.group_size} if config == "Int4WeightOnlyConfig" else {}
    quantization.quantize_(layer, getattr(quantization, config)(**options))
    return layer


def _bind(layer: nn.Linear, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _exact(layer: nn.Linear) -> Tensor:
    weight: Any = layer.weight
    return weight.dequantize().float()


def _peer(config: str, op: str, activations: str = KEPT) -> Peer:
    return Peer(
        f"torchao.{config.removesuffix('Config')}", op, functools.partial(_build, config=config), _bind, activations,
        DTYPES, ("torchao.quantization",), whole_groups, devices=("cuda",), exact=_exact,
    )  # fmt: skip


PEERS = (
    _peer("Int4WeightOnlyConfig", "int4_linear"),
    _peer("Int8WeightOnlyConfig", "int8_linear"),
    _peer("Int8DynamicActivationInt8WeightConfig", "int8_dynamic_linear", PER_ROW),
)
