"""The functional kernels. A linear op takes x [..., K] and a packed weight, and returns [..., N] in x's dtype.

x is fp32, bf16 or fp16, of any leading shape (M may be 0) and any strides; gradients flow to x and bias, never to
packed weights. Each op is also `torch.ops.llmkern.<name>` on plain tensors. Which kernel runs:
`llmkern.why("int4_linear", x, w)`.

Errors: ValueError for shapes and devices, TypeError for dtypes and kinds of weight, RuntimeError when a packed weight
is asked for a gradient, NotImplementedError when no kernel can run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from llmkern._registry import OPS
from llmkern.ops import bitmask_linear as _bitmask_linear
from llmkern.ops import gptq_block as _gptq_block
from llmkern.ops import int4_linear as _int4_linear
from llmkern.ops import int8_dynamic_linear as _int8_dynamic_linear
from llmkern.ops import int8_linear as _int8_linear
from llmkern.ops import scale_search as _scale_search
from llmkern.ops import sparse24_int4_linear as _sparse24_int4_linear
from llmkern.ops import sparse24_linear as _sparse24_linear
from llmkern.ops import sparsegpt_block as _sparsegpt_block
from llmkern.ops.linear_kl_div.functions import DistillLoss, linear_kl_div, linear_kl_div_topk

if TYPE_CHECKING:
    from llmkern.formats import BitmaskWeight, Int4Weight, Int8Weight, PackedWeight, Sparse24Int4Weight, Sparse24Weight

__all__ = [
    "DistillLoss",
    "bitmask_linear",
    "gptq_block",
    "int4_linear",
    "int8_dynamic_linear",
    "int8_linear",
    "linear",
    "linear_kl_div",
    "linear_kl_div_topk",
    "scale_search",
    "sparse24_int4_linear",
    "sparse24_linear",
    "sparsegpt_block",
]

gptq_block = _gptq_block.OP
sparsegpt_block = _sparsegpt_block.OP
scale_search = _scale_search.OP


def linear_args(name: str, x: Tensor, w: PackedWeight, bias: Tensor | None) -> tuple:
    """The plain-tensor arguments of linear op `name` for a packed weight; raises when they do not fit."""
    ops = getattr(w, "ops", ())
    if name not in ops:
        wanted = f"one of {', '.join(ops)}" if ops else "torch.nn.functional.linear"
        raise TypeError(f"{name}: w is a {type(w).__name__}, which is for {wanted}")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"{name}: x is {list(x.shape)}, but w is [N, K]={list(w.shape)}: x's last dim must be K")
    return (x, *w.op_args(bias))


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ wᵀ + bias by the op that belongs to the type of `w`."""
    if not getattr(w, "ops", ()):
        raise TypeError(f"linear: w must be a packed weight of llmkern.formats, got {type(w).__name__}")
    name = w.ops[0]
    return OPS[name](*linear_args(name, x, w, bias))


def int8_linear(x: Tensor, w: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Dequant-GEMM with int8 weights; activations at x's own precision."""
    return _int8_linear.OP(*linear_args("int8_linear", x, w, bias))


def int8_dynamic_linear(x: Tensor, w: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """int8 weights and x quantized per token to int8 on the fly; int32 accumulation. K is at most 66,311."""
    return _int8_dynamic_linear.OP(*linear_args("int8_dynamic_linear", x, w, bias))


def int4_linear(x: Tensor, w: Int4Weight, bias: Tensor | None = None, *, activations: str | None = None) -> Tensor:
    """Dequant-GEMM with int4 weights; `activations="int8"` quantizes x per token and weight group."""
    return _int4_linear.OP(*linear_args("int4_linear", x, w, bias), activations)


def sparse24_linear(x: Tensor, w: Sparse24Weight, bias: Tensor | None = None) -> Tensor:
    """2:4 sparse weights: two kept values of every four columns."""
    return _sparse24_linear.OP(*linear_args("sparse24_linear", x, w, bias))


def sparse24_int4_linear(x: Tensor, w: Sparse24Int4Weight, bias: Tensor | None = None) -> Tensor:
    """2:4 sparse weights whose kept values are int4 codes with group scales."""
    return _sparse24_int4_linear.OP(*linear_args("sparse24_int4_linear", x, w, bias))


def bitmask_linear(x: Tensor, w: BitmaskWeight, bias: Tensor | None = None) -> Tensor:
    """Unstructured sparse weights: kept values and one bit per position."""
    return _bitmask_linear.OP(*linear_args("bitmask_linear", x, w, bias))
