"""ggml through the libraries of an installed llama-cpp-python: q4_0 and q8_0, activations int8 per 32 values.

Both formats have fp16 scales of 32 columns, so they hold the same weight as everybody's when a scale of 128 columns (or
of a row) is repeated.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import PER_GROUP
from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled, Weights

F32, Q4_0, Q8_0 = 0, 2, 8  # of enum ggml_type
BLOCK = 32


class _Params(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The few functions that a product needs, with their types."""

    def __init__(self, folder: Path):
        self.libraries = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
            if (folder / f"lib{name}.so").is_file()
        ]
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
            ("ggml_init", pointer, (_Params,)),
            ("ggml_free", None, (pointer,)),
            ("ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, integer, integer)),
            ("ggml_mul_mat", pointer, (pointer, pointer, pointer)),
            ("ggml_new_graph", pointer, (pointer,)),
            ("ggml_build_forward_expand", None, (pointer, pointer)),
            ("ggml_nbytes", ctypes.c_size_t, (pointer,)),
            ("ggml_backend_cpu_init", pointer, ()),
            ("ggml_backend_cpu_set_n_threads", None, (pointer, ctypes.c_int)),
            ("ggml_backend_graph_compute", ctypes.c_int, (pointer, pointer)),
            ("ggml_backend_tensor_set", None, (pointer, pointer, ctypes.c_size_t, ctypes.c_size_t)),
            ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, (pointer, pointer)),
            ("ggml_backend_alloc_ctx_tensors", pointer, (pointer, pointer)),
            ("ggml_get_data", pointer, (pointer,)),
            ("ggml_backend_cpu_repack_buffer_type", pointer, ()),
        ):
            function = self._find(name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()  # type: ignore[attr-defined]
        self.threads = 0

    def _find(self, name: str) -> Any:
        for library in self.libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise ImportError(f"this build of ggml has no {name}")


@functools.cache
def _ggml() -> Any:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    return _Ggml(Path(spec.origin).parent / "lib")


def _blocks(weights: Rolled, kind: int) -> Tensor:
    """The bytes of q4_0 (a scale, then 16 bytes: value i low, value i + 16 high) or q8_0 (a scale, then 32 values)."""
    n, k = weights.shape
    if kind == Q4_0:
        scales = weights.scales4.repeat_interleave(weights.group_size // BLOCK, 1)
        codes = (weights.codes4.view(n, -1, BLOCK) + 8).to(torch.uint8)
        values = codes[..., :16] | codes[..., 16:] << 4
    else:
        scales = weights.scales8[:, None].expand(n, k // BLOCK)
        values = weights.codes8.view(n, -1, BLOCK).view(torch.uint8)
    return torch.cat([scales.half().unsqueeze(-1).contiguous().view(torch.uint8), values], -1).contiguous()


def _build(weights: Rolled, dtype: torch.dtype, kind: int, repacked: bool) -> tuple[Any, ...]:
    g, (n, k) = _ggml(), weights.shape
    context = g.init(_Params(1 << 20, None, True))
    tensor = g.new_tensor_2d(context, kind, k, n)
    kept = g.backend_alloc_ctx_tensors_from_buft(context, g.backend_cpu_repack_buffer_type()) if repacked else None
    kept = kept or g.backend_alloc_ctx_tensors(context, g.backend)
    blocks = _blocks(weights, kind)
    assert blocks.nbytes == g.nbytes(tensor)
    g.backend_tensor_set(tensor, blocks.data_ptr(), 0, blocks.nbytes)
    return tensor, n, context, kept


def _bind(layer: tuple[Any, ...], x: Tensor) -> Callable[[], Tensor]:
    g, (tensor, n, *_) = _ggml(), layer
    context = g.init(_Params(1 << 20, None, True))
    inputs = g.new_tensor_2d(context, F32, x.shape[1], len(x))
    product = g.mul_mat(context, tensor, inputs)
    graph = g.new_graph(context)
    g.build_forward_expand(graph, product)
    if not g.backend_alloc_ctx_tensors(context, g.backend):
        raise MemoryError("ggml could not allocate a product")
    g.backend_tensor_set(inputs, x.data_ptr(), 0, x.nbytes)
    if g.threads != torch.get_num_threads():
        g.threads = torch.get_num_threads()
        g.backend_cpu_set_n_threads(g.backend, g.threads)
    memory = (ctypes.c_float * (len(x) * n)).from_address(g.get_data(product))
    y, run, backend = torch.frombuffer(memory, dtype=torch.float32).view(len(x), n), g.backend_graph_compute, g.backend

    def call() -> Tensor:
        if run(backend, graph):
            raise RuntimeError("ggml refused the product")
        return y

    return call


def _refuses(weights: Weights) -> str | None:
    if weights.group_size % BLOCK:
        return f"needs groups of a multiple of {BLOCK}, got {weights.group_size}"
    return whole_groups(weights)


def _peer(name: str, op: str, kind: int, repacked: bool) -> Peer:
    return Peer(
        f"ggml.{name}{'.repacked' if repacked else ''}", op, functools.partial(_build, kind=kind, repacked=repacked),
        _bind, PER_GROUP, (torch.float32,), ("llama_cpp",), _refuses,
    )  # fmt: skip


PEERS = (
    _peer("q4_0", "int4_linear", Q4_0, False),
    _peer("q4_0", "int4_linear", Q4_0, True),
    _peer("q8_0", "int8_dynamic_linear", Q8_0, False),
    _peer("q8_0", "int8_dynamic_linear", Q8_0, True),
)
