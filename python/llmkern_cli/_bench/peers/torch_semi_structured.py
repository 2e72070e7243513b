"""2:4 sparse products of torch (cuSPARSELt): as its tensor subclass calls them, and with cuSPARSELt's own search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from llmkern_cli._bench.peers import Peer
from llmkern_cli._bench.weights import Rolled, Weights

ROWS = 8  # x is padded to a multiple of as many
DTYPES = (torch.bfloat16, torch.float16)
_algorithms: dict[tuple[Any, ...], int] = {}  # by shape, M and dtype: the search takes longer than the call


def _refuses(weights: Weights) -> str | None:
    n, k = weights.shape
    return f"takes N % 32 == 0 and K % 64 == 0, got {n}x{k}" if n % 32 or k % 64 else None


def _build(weights: Rolled, dtype: torch.dtype) -> Any:
    return torch.sparse.to_sparse_semi_structured(weights.sparse24.to(dtype))


def _bind(weight: Any, x: Tensor) -> Callable[[], Tensor]:
    return lambda: linear(x, weight)


def _bind_searched(weight: Any, x: Tensor) -> Callable[[], Tensor]:
    m, packed = len(x), weight.packed
    columns = pad(x, (0, 0, 0, -m % ROWS)).t()
    key = (*weight.shape, m, x.dtype)
    if key not in _algorithms:
        _algorithms[key] = torch._cslt_sparse_mm_search(packed, columns, transpose_result=True)
    run, algorithm = torch._cslt_sparse_mm, _algorithms[key]
    return lambda: run(packed, columns, transpose_result=True, alg_id=algorithm)[:m]


PEERS = (
    Peer(
        "torch.to_sparse_semi_structured", "sparse24_linear", _build, _bind, dtypes=DTYPES, refuses=_refuses,
        devices=("cuda",),
    ),
    Peer(
        "torch._cslt_sparse_mm, searched", "sparse24_linear", _build, _bind_searched, dtypes=DTYPES, refuses=_refuses,
        devices=("cuda",),
    ),
)  # fmt: skip
