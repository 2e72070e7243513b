"""OpenVINO, compressed weights: activations kept (dynamic quantization off), or int8 per group of 128 or per row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import KEPT, PER_GROUP, PER_ROW
from llmkern_cli._bench.peers import Peer, no_refusal, whole_groups
from llmkern_cli._bench.weights import Rolled

MOST_COPIES = 100
PER_TOKEN = 2**64 - 1  # the size of a group that OpenVINO takes for "the whole row"


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _build(weights: Rolled, dtype: torch.dtype, bits: int, group: int) -> Any:
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    (n, k), g = weights.shape, weights.group_size
    if bits == 4:
        codes = weights.codes4.view(n, k // g, g)
        nibbles = (codes.flatten()[::2] & 15) | (codes.flatten()[1::2] << 4)
        values = nibbles.view(torch.uint8).numpy()
        stored = openvino.Tensor(values, [n, k // g, g], openvino.Type.i4)
        scales = weights.scales4.contiguous().view(n, k // g, 1)
    else:
        values = weights.codes8.numpy()
        stored = openvino.Tensor(values)
        scales = weights.scales8.view(n, 1)
    # Scales in fp16 are how compressed models store them: a scale that fp16 cannot hold exactly is refused.
    if not torch.equal(scales.half().float(), scales):
        raise ValueError("scales outside fp16")
    wide = ops.convert(ops.constant(stored), "f16")
    weight = ops.multiply(wide, ops.constant(scales.half().numpy()))
    if bits == 4:
        weight = ops.reshape(weight, [n, k], False)
    x = ops.parameter([-1, k], np.float32)
    y = ops.matmul(x, ops.convert(weight, "f32"), False, True)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
    }  # fmt: skip
    return _core().compile_model(openvino.Model([y], [x]), "CPU", options), values  # tensors borrow their memory


def _bind(layer: tuple[Any, Any], x: Tensor) -> Callable[[], Any]:
    import openvino

    request, inputs = layer[0].create_infer_request(), x.float()
    request.set_input_tensor(openvino.Tensor(inputs.numpy(), shared_memory=True))
    infer = request.infer

    def call() -> Any:
        infer()
        return request.get_output_tensor().data

    call.inputs = inputs  # type: ignore[attr-defined]  # the request borrows its memory

    return call


def _peer(bits: int, group: int, label: str, activations: str) -> Peer:
    op = "int4_linear" if bits == 4 else "int8_linear" if activations == KEPT else "int8_dynamic_linear"
    kept = (torch.float32, torch.bfloat16) if activations == KEPT else (torch.float32,)
    return Peer(
        f"openvino.int{bits}.{label}", op, functools.partial(_build, bits=bits, group=group), _bind, activations, kept,
        ("openvino",), whole_groups if bits == 4 else no_refusal, MOST_COPIES,
    )  # fmt: skip


PEERS = (
    _peer(4, 0, "kept", KEPT),
    _peer(4, 128, "group128", PER_GROUP),
    _peer(8, 0, "kept", KEPT),
    _peer(8, 128, "group128", PER_GROUP),
    _peer(8, PER_TOKEN, "row", PER_ROW),
)
