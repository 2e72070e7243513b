"""XNNPACK through executorch: int8 or int4 weights per channel or group, activations quantized per row to int8."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import PER_ROW
from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled

MOST_COPIES = 24


def _build(weights: Rolled, dtype: torch.dtype, bits: int) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, quantize_

    n, k = weights.shape
    layer = torch.nn.Linear(k, n, bias=False).requires_grad_(False)
    if bits == 4:
        exact = weights.codes4.float() * weights.scales4.repeat_interleave(weights.group_size, 1)
        granularity: Any = PerGroup(weights.group_size)
    else:
        exact = weights.codes8.float() * weights.scales8[:, None]
        granularity = PerAxis(0)
    layer.weight.copy_(exact)
    model = torch.nn.Sequential(layer).eval()
    kind = getattr(torch, f"int{bits}")
    rows = torch.export.Dim("m", min=1, max=4096)
    with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode(False), torch.no_grad():
        quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=granularity))
        exported = torch.export.export(model, (torch.randn(4, k),), dynamic_shapes=({0: rows},))
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    program = Runtime.get().load_program(lowered.buffer)
    return program, program.load_method("forward")


def _bind(layer: Any, x: Tensor) -> Callable[[], Tensor]:
    execute = layer[1].execute
    return lambda: execute((x,))[0]


def _peer(bits: int) -> Peer:
    op = "int4_linear" if bits == 4 else "int8_dynamic_linear"
    return Peer(
        f"xnnpack.qd8_qc{bits}w" if bits == 8 else "xnnpack.qd8_qb4w", op, functools.partial(_build, bits=bits), _bind,
        PER_ROW, (torch.float32,), ("executorch.runtime", "torchao"), whole_groups, MOST_COPIES,
    )  # fmt: skip


PEERS = (_peer(4), _peer(8))
