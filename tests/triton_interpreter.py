"""Triton's interpreter (3.6) as the hardware is, for triton_kernels.py: scalars as bounds of loops, and bf16.

It turns scalars of one element into indices, which NumPy 2.4 refuses; cuts fp32 off where hardware rounds to bf16; and
multiplies the bits of bf16 in a dot product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def patch() -> None:
    """Change the interpreter of this process."""
    builder, patch_tensor = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    cast, dot = builder.cast_impl, builder.create_dot

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_cast(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(src.data), tl.float32)
        return cast(self, src, dst_type)

    def patched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen(side.data), tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patched_tensor
    builder.cast_impl = patched_cast
    builder.create_dot = patched_dot
