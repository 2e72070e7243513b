"""ggml, as llama-cpp-python brings it: q4_0 and q8_0, whose scales are per 32 columns, as are those of the activations.

Both formats hold our codes exactly: each of their blocks gets the scale of the group that it lies in. The weight is
packed as llama.cpp does it when it loads a model: in the first of the CPU backend's own layouts (AMX, repacked) that
can multiply it here, else in rows.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import PER_GROUP
from llmkern_cli._bench.peers import Peer
from llmkern_cli._bench.weights import Rolled, Weights

BLOCK = 32
F32, KINDS = 0, {4: 2, 8: 8}  # of ggml's enumeration of types: q4_0 and q8_0
MOST_COPIES = 400
CONTEXT_BYTES = 16_384  # of descriptions of three tensors and a graph of one node; the data lies elsewhere
GRAPH_NODES = 8

P, I64, SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
WARNINGS = (3, 4)  # and errors, of its levels of messages
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, P)


@LOG
def _log(level: int, text: bytes, _: int | None) -> None:
    """Its other messages are a line per weight that is packed."""
    if level in WARNINGS:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class _Memory(ctypes.Structure):
    _fields_ = (("size", SIZE), ("buffer", P), ("no_alloc", ctypes.c_bool))


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_log_set": (None, (LOG, P)),
    "ggml_init": (P, (_Memory,)),
    "ggml_free": (None, (P,)),
    "ggml_new_tensor_2d": (P, (P, ctypes.c_int, I64, I64)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_new_graph_custom": (P, (P, SIZE, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_backend_cpu_init": (P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (P, ctypes.c_int)),
    "ggml_backend_cpu_buffer_type": (P, ()),
    "ggml_backend_cpu_buffer_from_ptr": (P, (P, SIZE)),
    "ggml_backend_get_device": (P, (P,)),
    "ggml_backend_dev_backend_reg": (P, (P,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (P, P)),
    "ggml_backend_reg_get_proc_address": (P, (P, ctypes.c_char_p)),
    "ggml_backend_buft_get_alloc_size": (SIZE, (P, P)),
    "ggml_backend_buft_alloc_buffer": (P, (P, SIZE)),
    "ggml_backend_buffer_get_base": (P, (P,)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_tensor_alloc": (ctypes.c_int, (P, P, P)),
    "ggml_backend_tensor_set": (None, (P, P, SIZE, SIZE)),
    "ggml_backend_graph_compute": (ctypes.c_int, (P, P)),
}


class _Library:
    """ggml's functions, its CPU backend, and the kinds of memory of that backend, the best first."""

    def __init__(self) -> None:
        from llama_cpp._ggml import libggml

        self.c: Any = ctypes.CDLL(libggml._name)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.c.ggml_log_set(_log, None)
        self.backend = self.c.ggml_backend_cpu_init()
        self.device = self.c.ggml_backend_get_device(self.backend)
        self.kinds_of_memory = [*self._layouts(), self.c.ggml_backend_cpu_buffer_type()]

    def _layouts(self) -> list[int]:
        """A list that ends with a null pointer; where the function is missing, the backend has no further kinds."""
        registered = self.c.ggml_backend_dev_backend_reg(self.device)
        found = self.c.ggml_backend_reg_get_proc_address(registered, b"ggml_backend_dev_get_extra_bufts")
        if not found:
            return []
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(found)(self.device)
        layouts: list[int] = []
        while kinds and (kind := kinds[len(layouts)]):
            layouts.append(kind)
        return layouts


@functools.cache
def _library() -> _Library:
    return _Library()


class _Context:
    """Owns descriptions of tensors and the memory they lie in."""

    def __init__(self) -> None:
        self.c = _library().c
        self.at = self.c.ggml_init(_Memory(CONTEXT_BYTES, None, True))
        weakref.finalize(self, self.c.ggml_free, self.at)

    def place(self, tensor: int, buffer: int, address: int) -> None:
        """`tensor` at an address in a buffer that goes with this context."""
        weakref.finalize(self, self.c.ggml_backend_buffer_free, buffer)
        if self.c.ggml_backend_tensor_alloc(buffer, tensor, address):
            raise RuntimeError("ggml_backend_tensor_alloc failed")

    def borrow(self, tensor: int, memory: Tensor) -> None:
        """`tensor` in a contiguous torch tensor."""
        address = memory.data_ptr()
        self.place(tensor, self.c.ggml_backend_cpu_buffer_from_ptr(address, memory.nbytes), address)


class _Layer(_Context):
    """A weight [N, K], from the bytes of its blocks [N, K / 32, bytes of a block]."""

    def __init__(self, bits: int, blocks: Tensor, kind_of_memory: int):
        super().__init__()
        n, groups, _ = blocks.shape
        self.shape = n, groups * BLOCK
        self.weight = self.c.ggml_new_tensor_2d(self.at, KINDS[bits], self.shape[1], n)
        size = self.c.ggml_backend_buft_get_alloc_size(kind_of_memory, self.weight)
        buffer = self.c.ggml_backend_buft_alloc_buffer(kind_of_memory, size)
        if not buffer:
            raise MemoryError(f"{size} bytes of ggml's memory")
        self.place(self.weight, buffer, self.c.ggml_backend_buffer_get_base(buffer))
        x = self.c.ggml_new_tensor_2d(self.at, F32, self.shape[1], 1)
        product = self.c.ggml_mul_mat(self.at, self.weight, x)
        self.usable = self.c.ggml_backend_dev_supports_op(_library().device, product)
        if self.usable:
            self.c.ggml_backend_tensor_set(self.weight, blocks.data_ptr(), 0, blocks.nbytes)


def _blocks(weights: Rolled, bits: int) -> Tensor:
    """uint8 [N, K / 32, 18 or 34]: a scale in fp16, then the codes; q4_0 stores u = q + 8, columns j and j + 16 in byte
    j, the lower one in the lower half.
    """
    n, groups = weights.shape[0], weights.shape[1] // BLOCK
    if bits == 4:
        scales = weights.scales4.repeat_interleave(weights.group_size // BLOCK, 1)
        codes = (weights.codes4 + 8).to(torch.uint8).view(n, groups, BLOCK)
        values = codes[..., :16] | codes[..., 16:] << 4
    else:
        scales = weights.scales8[:, None].expand(n, groups)
        values = weights.codes8.view(n, groups, BLOCK).view(torch.uint8)
    half = scales.half()
    if not torch.equal(half.float(), scales):
        raise ValueError("scales outside fp16")
    return torch.cat([half.contiguous()[..., None].view(torch.uint8), values], -1).contiguous()


def _build(weights: Rolled, dtype: torch.dtype, bits: int) -> _Layer:
    blocks = _blocks(weights, bits)
    layers = (_Layer(bits, blocks, kind) for kind in _library().kinds_of_memory)
    return next(layer for layer in layers if layer.usable)


def _bind(layer: _Layer, x: Tensor) -> Callable[[], Tensor]:
    library, context, y = _library(), _Context(), x.new_empty(len(x), layer.shape[0])
    c, backend = library.c, library.backend
    inputs = c.ggml_new_tensor_2d(context.at, F32, *reversed(x.shape))
    product = c.ggml_mul_mat(context.at, layer.weight, inputs)
    context.borrow(inputs, x)
    context.borrow(product, y)
    graph = c.ggml_new_graph_custom(context.at, GRAPH_NODES, False)
    c.ggml_build_forward_expand(graph, product)
    c.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    run = c.ggml_backend_graph_compute

    def call() -> Tensor:
        if run(backend, graph):
            raise RuntimeError("ggml_backend_graph_compute failed")
        return y

    call.borrowed = (context, layer, x)  # type: ignore[attr-defined]  # the graph points into their memory

    return call


def _refuses(weights: Weights) -> str | None:
    k, g = weights.shape[1], weights.group_size
    return f"needs whole blocks of {BLOCK} columns, got K={k} and groups of {g}" if k % BLOCK or g % BLOCK else None


def _peer(bits: int, op: str) -> Peer:
    return Peer(
        f"ggml.q{bits}_0", op, functools.partial(_build, bits=bits), _bind, PER_GROUP, (torch.float32,),
        ("llama_cpp",), _refuses, MOST_COPIES, group_size=BLOCK,
    )  # fmt: skip


PEERS = (_peer(4, "int4_linear"), _peer(8, "int8_dynamic_linear"))
