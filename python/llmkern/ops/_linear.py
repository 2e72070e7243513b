"""What the linear ops share: the checks of x and bias, the fake, the gradient, and the pointers of a native call.

Every linear op is `name(Tensor x, <weight tensors>, Tensor? bias, int group_size, ...) -> Tensor` with
x [..., K] in fp32, bf16 or fp16, and returns [..., N] in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern._registry import Op

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def groups(k: int, group_size: int) -> int:
    """Number of groups along K; the last one may be short."""
    return -(-k // group_size)


def expand_groups(scales: Tensor, group_size: int, k: int) -> Tensor:
    """[N, G] -> [N, K]: each group's value repeated over its columns."""
    return scales.repeat_interleave(group_size, dim=1)[:, :k]


def check_input(name: str, x: Tensor, tensors: dict[str, Tensor | None], n: int, bias: Tensor | None) -> None:
    """Raise unless x and bias fit a weight of `n` rows whose tensors are `tensors`."""
    if x.ndim == 0:
        raise ValueError(f"{name}: x must be [..., K], got a scalar")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: x must be float32, bfloat16 or float16, got {x.dtype}")
    device = x.device
    for label, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, but x is on {x.device}")
        if tensor.requires_grad:
            raise RuntimeError(
                f"{name}: {label} requires a gradient, but packed weights have none; gradients flow to x"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {label} must be contiguous, got strides {tuple(tensor.stride())}")
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"{name}: bias must be [N]=[{n}], got {list(bias.shape)}")
        if bias.dtype not in FLOATS:
            raise TypeError(f"{name}: bias must be float32, bfloat16 or float16, got {bias.dtype}")
        if bias.device != device:
            raise ValueError(f"{name}: bias is on {bias.device}, but x is on {x.device}")


def check_group_size(name: str, group_size: int, k: int) -> None:
    """Raise unless 1 <= group_size <= K."""
    if not 1 <= group_size <= max(k, 1):
        raise ValueError(f"{name}: group_size must be in [1, K={k}], got {group_size}")


def check_scales(name: str, scales: Tensor | None, zeros: Tensor | None, n: int, k: int, group_size: int) -> None:
    """Raise unless scales (float) and zeros (int8) are [N, ceil(K / group_size)]."""
    check_group_size(name, group_size, k)
    shape = (n, groups(k, group_size))
    if scales is not None:
        if scales.dtype not in FLOATS:
            raise TypeError(f"{name}: scales must be float32, bfloat16 or float16, got {scales.dtype}")
        if scales.shape != shape:
            raise ValueError(
                f"{name}: scales must be [N, G]={list(shape)} for K={k} and group_size={group_size}, "
                f"got {list(scales.shape)}"
            )
    if zeros is not None:
        if zeros.dtype != torch.int8:
            raise TypeError(f"{name}: zeros must be int8, got {zeros.dtype}")
        if zeros.shape != shape:
            raise ValueError(f"{name}: zeros must be [N, G]={list(shape)}, got {list(zeros.shape)}")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight [N, K]ᵀ + bias in weight's dtype, returned in x's."""
    y = x.to(weight.dtype) @ weight.T
    return (y if bias is None else y + bias.to(weight.dtype)).to(x.dtype)


def linear_op(schema: str, *, check: Callable[..., int], dequantize: Callable[..., Tensor]) -> Op:
    """Declare a linear op.

    `check(*args)` raises on bad arguments and returns N; `dequantize(x, *args, dtype=...)` gives the dense [N, K]
    weight, which the gradient of x needs: dx = dy @ W.
    """
    names = [part.split()[-1].split("=")[0] for part in schema[schema.index("(") + 1 : schema.rindex(")")].split(",")]
    bias_at = names.index("bias")

    def fake(n: int, x: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], n))

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.x_shape, ctx.dtype = inputs[0].shape, inputs[0].dtype
        ctx.other = [value for value in inputs[1:] if not isinstance(value, Tensor)]
        ctx.tensor_at = [at for at, value in enumerate(inputs[1:]) if isinstance(value, Tensor)]
        bias = inputs[bias_at]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*(value for value in inputs[1:] if isinstance(value, Tensor)))

    def backward(ctx: Any, dy: Tensor) -> tuple:
        saved, other = iter(ctx.saved_tensors), iter(ctx.other)
        rest = [next(saved) if at in ctx.tensor_at else next(other) for at in range(len(names) - 1)]
        grads: list[Any] = [None] * len(names)
        if ctx.needs_input_grad[0]:
            x = dy.new_empty(ctx.x_shape)
            grads[0] = (dy.float() @ dequantize(x, *rest)).to(ctx.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[bias_at]:
            grads[bias_at] = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return tuple(grads)

    return Op(schema, check=check, fake=fake, backward=backward, setup_context=setup_context)


def native_call(function: Callable[..., None], x: Tensor, n: int, bias: Tensor | None, *weight: Any) -> Tensor:
    """Call a native linear kernel: `function(x, bias, y, m, n, k, dtypes, threads, *weight)`.

    Tensors in `weight` become (pointer) or, for floats and int8 values, (pointer, dtype code): see each op's
    `native`. The kernel writes every element of y.
    """
    shape = x.shape
    rows = x.contiguous()
    bias_at = bias_dtype = 0
    if bias is not None:
        bias = bias.contiguous()  # named: a temporary would be freed before the kernel reads it
        bias_at, bias_dtype = bias.data_ptr(), DTYPE_CODES[bias.dtype]
    y = x.new_empty(*shape[:-1], n)  # a size as one tuple costs 0.3 us more
    if size := y.numel():
        function(
            rows.data_ptr(), DTYPE_CODES[x.dtype], bias_at, bias_dtype, y.data_ptr(), size // n, n, shape[-1],
            torch.get_num_threads(), *weight,
        )  # fmt: skip
    return y


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor's data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
