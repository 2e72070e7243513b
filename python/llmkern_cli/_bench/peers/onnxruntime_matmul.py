"""onnxruntime: MatMulNBits, which keeps activations in fp32 (accuracy level 0) or quantizes them per block to int8
(level 4), and the int8 product with activations quantized per tensor.

All sessions share one pool of threads: one of each session's own would spin beside the others. Every copy has its own
bytes, because equal prepacked weights may be shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import KEPT, PER_GROUP, PER_ROW
from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled

MOST_COPIES = 200


@functools.cache
def _pool(threads: int) -> None:
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _session(nodes: list[Any], constants: list[Any], n: int, k: int) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    shared = hasattr(onnxruntime, "set_global_thread_pool_sizes")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if shared:
        _pool(torch.get_num_threads())
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = torch.get_num_threads()
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _build4(weights: Rolled, dtype: torch.dtype, level: int) -> Any:
    from onnx import helper, numpy_helper

    (n, k), g = weights.shape, weights.group_size
    codes = (weights.codes4 + 8).to(torch.uint8)
    words = (codes[:, ::2] | codes[:, 1::2] << 4).view(n, k // g, g // 2)
    constants = [
        numpy_helper.from_array(words.numpy(), "w"),
        numpy_helper.from_array(weights.scales4.contiguous().flatten().numpy(), "s"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=g,
        accuracy_level=level,
    )  # fmt: skip
    return _session([node], constants, n, k)


def _build8(weights: Rolled, dtype: torch.dtype) -> Any:
    from onnx import helper, numpy_helper

    n, k = weights.shape
    constants = [
        numpy_helper.from_array(weights.codes8.T.contiguous().numpy(), "w"),
        numpy_helper.from_array(weights.scales8.numpy(), "s"),
    ]
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    return _session([node], constants, n, k)


def _bind(session: Any, x: Tensor) -> Callable[[], Tensor]:
    """The session on buffers of ours, so that no call allocates or copies."""
    import numpy as np

    n = session.get_outputs()[0].shape[1]
    y = torch.empty(len(x), n)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())
    run = session.run_with_iobinding

    def call() -> Tensor:
        run(binding)
        return y

    return call


def _four(level: int, activations: str) -> Peer:
    return Peer(
        f"onnxruntime.MatMulNBits.level{level}", "int4_linear", functools.partial(_build4, level=level), _bind,
        activations, (torch.float32,), ("onnxruntime", "onnx"), whole_groups, MOST_COPIES,
    )  # fmt: skip


PEERS = (
    _four(0, KEPT),
    _four(4, PER_GROUP),
    Peer(
        "onnxruntime.DynamicQuantizeMatMul", "int8_dynamic_linear", _build8, _bind, PER_ROW, (torch.float32,),
        ("onnxruntime", "onnx"), most_copies=MOST_COPIES,
    ),
)  # fmt: skip
