"""Dense fp32 products, by oneDNN on a CPU: what calibration and the solvers spend their time in.

torch's own path for fp32 on CPU is MKL, which reached 210 GFLOP/s where oneDNN reached 480 (2 cores of an AMD EPYC with
AVX-512; [576, 1536] @ [1536, 128] and larger). The result is fp32 either way. Where torch was built without oneDNN,
torch's own product runs. On a GPU the products are torch's, in fp32 whatever the user allows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmkern import _features

Result = TypeVar("Result")
# Fewer multiplications than this take longer to hand over than to do.
WORTH = 1 << 18
# From as many on rounding to bf16 first gains 10 to 90 % (measured from 2^23 on: 2 cores of an AMD EPYC, avx512_bf16).
WORTH_ROUNDING = 1 << 22
# Rows per part of `add_product`: enough for full speed, few enough that the copy and the product stay in cache.
ROWS = 1024


@cache
def _onednn() -> torch._ops.OpOverloadPacket | None:
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(a: Tensor, b: Tensor, *, rough: bool = False) -> Tensor:
    """a [..., N, K] @ b [..., K, M], fp32, without gradients; a new tensor. Leading dims are the same.

    rough: three digits will do, so a CPU may multiply in bf16 where that is faster (`half_is_fast`). A matrix that
    `rounded` gave is multiplied so without being asked.
    """
    if a.is_cuda:
        with full_fp32():
            return a @ b
    half = torch.bfloat16 in (a.dtype, b.dtype)
    if half or (rough and a.ndim == 2 and _rounds(a.shape[0] * a.shape[1] * b.shape[1])):
        return (a.bfloat16() @ b.bfloat16()).float()
    op = _onednn()
    if op is None or a.ndim != 2 or not _fits(a, b) or a.shape[0] * a.shape[1] * b.shape[1] < WORTH:
        return a @ b
    # oneDNN has no fast path for a matrix that is a part of a wider one.
    weight = b.T if b.is_contiguous() or b.T.is_contiguous() else b.contiguous().T
    return op(a.contiguous(), weight, None, "none", [], "")


def rounded(x: Tensor, multiplications: int) -> Tensor:
    """A matrix for several rough products of so many multiplications: bf16 where they would round it, else itself."""
    return x.bfloat16() if on_host(x) and _rounds(multiplications) else x


def add_product(out: Tensor, a: Tensor, b: Tensor, less: Tensor, *, rough: bool = False) -> None:
    """out [N, M] += (a - less) [N, K] @ b [K, M], fp32; each may be a part of a wider matrix.

    rough: as for `product`.
    """
    if not on_host(out):
        with full_fp32():
            out.addmm_(a - less, b)
        return
    half = rough and _rounds(a.shape[0] * a.shape[1] * b.shape[1])
    b = b.bfloat16() if half else b.contiguous()
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        moved = a[rows] - less[rows]
        out[rows] += moved.bfloat16() @ b if half else product(moved, b)


def take_columns(x: Tensor, order: Tensor, out: Tensor) -> Tensor:
    """out = x[:, order] of x [N, K] and order int64 [M]; returns out. (torch's index_select would use one core.)"""
    return torch.gather(x, 1, order.expand(len(x), -1), out=out)


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] @ b [K, M] of bf16 or fp16 on a GPU, summed in fp32; fp32.

    A product of two of these is exact in fp32, so only the sums round, as if both were fp32.
    """
    return torch.mm(a, b, out_dtype=torch.float32)


@cache
def half_is_fast() -> bool:
    """Whether a CPU product of bf16 matrices is quicker than one of fp32: oneDNN, and a machine that is good at it."""
    return _onednn() is not None and _features.half_is_fast()


def _rounds(multiplications: int) -> bool:
    return multiplications >= WORTH_ROUNDING and half_is_fast()


def on_host(x: Tensor) -> bool:
    """Whether looking at a value of x waits for nothing that was asked for before."""
    return x.device.type == "cpu"


@contextmanager
def full_fp32() -> Iterator[None]:
    """Inside, a GPU multiplies fp32 as fp32: no TF32, whatever the user has set. The setting comes back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    # torch has two names for this, refuses to read the older ones after the newer was set, and wants each set back.
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = ""
    if older:
        matmul.allow_tf32 = False
    else:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older == "medium":
            torch.set_float32_matmul_precision(older)
        elif older:
            matmul.allow_tf32 = True
        else:
            matmul.fp32_precision = before


def side_by_side(on: Tensor, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each task returns; those on the CPU (where `on` is) run as many at a time as torch has threads, on one each.

    For tasks of thousands of steps too small to divide, between which threads would wait for each other. The first
    error is raised once nothing runs any more.
    """
    if not on_host(on):
        return [task() for task in tasks]
    threads, inference, gradients = torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alone(task: Callable[[], Result]) -> Result:
        torch.set_num_threads(1)  # of this thread; MKL, where torch has it, takes it for all
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return task()

    try:
        if min(threads, len(tasks)) <= 1:
            return [alone(task) for task in tasks]
        with ThreadPoolExecutor(min(threads, len(tasks))) as pool:
            return list(pool.map(alone, tasks))
    finally:
        torch.set_num_threads(threads)


def squared(x: Tensor) -> Tensor:
    """|x|² of a contiguous fp32 x, a fp64 scalar."""
    flat = x.view(-1)
    return torch.dot(flat, flat).double()


@contextmanager
def dense_by_onednn(model: nn.Module, *, rough: bool = False) -> Iterator[None]:
    """Inside, the model's fp32 nn.Linear layers on CPU multiply by oneDNN; gradients go to inputs only.

    rough: as for `product`. What lies between the layers, a sum of all blocks before it, stays fp32.
    Nothing here keeps a layer alive: one that is replaced meanwhile takes its dense weight with it.
    """
    taken: list[weakref.ref[nn.Module]] = []
    if _onednn() is not None:
        for layer in model.modules():
            # A forward set on the instance (by a library that moves weights) must stay in charge.
            if type(layer) is nn.Linear and "forward" not in vars(layer):
                layer.forward = partial(_forward, weakref.proxy(layer), rough)  # type: ignore[method-assign, arg-type]
                taken.append(weakref.ref(layer))
    try:
        yield
    finally:
        for reference in taken:
            if (alive := reference()) is not None:
                del alive.forward


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, rough: bool) -> Tensor:
    """x [..., K] @ weight [N, K]ᵀ + bias, fp32."""
    op = _onednn()
    assert op is not None
    if not rough or not _rounds(x.numel() * len(weight)):
        return op(x, weight, bias, "none", [], "")
    out = op(x.bfloat16(), weight.bfloat16(), None, "none", [], "").float()
    return out if bias is None else out.add_(bias)


class _Product(torch.autograd.Function):
    """`_linear`, with a gradient by x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rough: bool) -> Tensor:
        """[..., N]."""
        ctx.save_for_backward(weight)
        ctx.rough = rough
        return _linear(x, weight, bias, rough)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """By x."""
        (weight,) = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        return product(rows, weight, rough=ctx.rough).view(*gradient.shape[:-1], weight.shape[1]), None, None, None


def _forward(layer: nn.Linear, rough: bool, x: Tensor) -> Tensor:
    weight = layer.weight
    if _fits(x, weight) and x.numel():
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, weight, layer.bias, rough)
        return _linear(x, weight, layer.bias, rough)
    return nn.functional.linear(x, weight, layer.bias)


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
