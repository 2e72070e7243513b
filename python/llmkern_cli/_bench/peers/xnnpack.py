"""XNNPACK, as executorch brings it: int4 in groups and int8 in rows, activations to int8 with one scale per row.

A program is lowered for one number of rows of x, once for all copies of a layer; every copy loads it anew, and packs
the weight into memory of its own when it runs first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import PER_ROW
from llmkern_cli._bench.peers import Peer, no_refusal
from llmkern_cli._bench.weights import Rolled, Weights

MOST_COPIES = 200
# The program of the smallest M is made twice: to count copies, and to be timed. More are not worth their memory.
PROGRAMS = 2
RANGES = {4: (-8, 7), 8: (-128, 127)}


class _Layer(NamedTuple):
    weights: Weights
    bits: int


class _Linear(torch.nn.Module):
    """Quantize and dequantize, the form in which the lowering finds a product of quantized factors."""

    def __init__(self, codes: Tensor, scales: Tensor, bits: int):
        super().__init__()
        self.codes, self.scales, self.range = codes, scales, RANGES[bits]
        self.zeros = torch.zeros_like(scales, dtype=torch.int8)
        self.group = [1, codes.shape[1] // scales.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        ops, row = torch.ops.torchao, [1, x.shape[1]]
        grid = ops.choose_qparams_affine(
            x, "ASYMMETRIC", row, torch.int8, *RANGES[8], None, torch.float32, torch.int8
        )  # fmt: skip
        codes = ops.quantize_affine(x, row, *grid, torch.int8, *RANGES[8])
        rounded = ops.dequantize_affine(codes, row, *grid, torch.int8, *RANGES[8])
        weight = ops.dequantize_affine(self.codes, self.group, self.scales, self.zeros, torch.int8, *self.range)
        return torch.nn.functional.linear(rounded, weight)


@functools.lru_cache(maxsize=PROGRAMS)
def _program(weights: Weights, bits: int, m: int) -> bytes:
    import torchao.quantization.quant_primitives  # noqa: F401 - defines torch.ops.torchao
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    codes = weights.codes4 if bits == 4 else weights.codes8
    scales = weights.scales4 if bits == 4 else weights.scales8[:, None]
    with torch.inference_mode(False):
        layer = _Linear(codes.clone(), scales.clone(), bits).eval()
        exported = torch.export.export(layer, (torch.zeros(m, weights.shape[1]),))
        rule = XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)
        lowered = to_edge_transform_and_lower(exported, partitioner=[rule])
        left = [str(node.target) for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
        if len(left) != 2 or "delegate" not in left[0]:
            raise RuntimeError(f"XNNPACK did not take the whole layer: {', '.join(left)}")
        return lowered.to_executorch().buffer


@functools.cache
def _runtime(threads: int) -> Any:
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    return portable_lib


def _build(weights: Rolled, dtype: torch.dtype, bits: int) -> _Layer:
    return _Layer(weights.source, bits)


def _bind(layer: _Layer, x: Tensor) -> Callable[[], Tensor]:
    program = _program(*layer, len(x))
    run = _runtime(torch.get_num_threads())._load_for_executorch_from_buffer(program).run_method

    def call() -> Tensor:
        return run("forward", (x,), False)[0]

    call()
    return call


def _refuses4(weights: Weights) -> str | None:
    k, g = weights.shape[1], weights.group_size
    return f"needs whole groups of a multiple of 32, got K={k} and groups of {g}" if k % g or g % 32 else None


def _peer(bits: int, op: str, refuses: Callable[[Weights], str | None]) -> Peer:
    return Peer(
        f"xnnpack.qd8.{'qb4w' if bits == 4 else 'qc8w'}", op, functools.partial(_build, bits=bits), _bind, PER_ROW,
        (torch.float32,), ("executorch.extension.pybindings.portable_lib", "torchao"), refuses, MOST_COPIES,
    )  # fmt: skip


PEERS = (_peer(4, "int4_linear", _refuses4), _peer(8, "int8_dynamic_linear", no_refusal))
