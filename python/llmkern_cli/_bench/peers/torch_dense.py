"""torch's dense product, on the plain weight and on oneDNN's own layout of it (what `torch.compile` uses frozen)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern_cli._bench.peers import Peer
from llmkern_cli._bench.weights import Rolled


def _build(weights: Rolled, dtype: torch.dtype) -> Tensor:
    return weights.dense.to(dtype)


def _bind(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.linear(x, weight)


def _build_prepacked(weights: Rolled, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weights.dense.to(dtype))


def _bind_prepacked(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    run = torch.ops.mkldnn._linear_pointwise.default
    return lambda: run(x, weight, None, "none", [], "")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PEERS = (
    Peer("torch.dense", "linear", _build, _bind, dtypes=DTYPES, devices=("cpu", "cuda")),
    Peer("torch.dense.prepacked", "linear", _build_prepacked, _bind_prepacked),
)
