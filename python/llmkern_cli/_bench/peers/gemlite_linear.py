"""gemlite: Triton kernels for int4 and int8 weights; it tunes itself at the first call of every size, if it has no
stored choice for this GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import KEPT, PER_ROW
from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled

DTYPES = (torch.bfloat16, torch.float16)


def _build4(weights: Rolled, dtype: torch.dtype) -> Any:
    from gemlite.helper import A16Wn

    codes, scales = (weights.codes4 + 8).to(torch.uint8), weights.scales4.to(dtype)
    return A16Wn(device=weights.source.device, dtype=dtype).from_weights(
        codes, scales, torch.full_like(scales, 8), 4, weights.group_size
    )


def _build8(weights: Rolled, dtype: torch.dtype) -> Any:
    from gemlite.helper import A16W8

    return A16W8(device=weights.source.device, dtype=dtype).from_weights(
        weights.codes8, scales=weights.scales8[:, None]
    )


def _build_dynamic(weights: Rolled, dtype: torch.dtype) -> Any:
    from gemlite.helper import A8W8_dynamic

    return A8W8_dynamic(device=weights.source.device, dtype=dtype).from_weights(
        weights.codes8, scales=weights.scales8[:, None]
    )


def _bind(layer: Any, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _peer(name: str, op: str, build: Callable[[Rolled, torch.dtype], Any], activations: str = KEPT) -> Peer:
    return Peer(f"gemlite.{name}", op, build, _bind, activations, DTYPES, ("gemlite",), whole_groups, devices=("cuda",))


PEERS = (
    _peer("int4.kept", "int4_linear", _build4),
    _peer("int8.kept", "int8_linear", _build8),
    _peer("int8.int8", "int8_dynamic_linear", _build_dynamic, PER_ROW),
)
