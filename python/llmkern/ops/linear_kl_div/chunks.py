"""The rows of linear_kl_div, a chunk at a time: two products, the row kernel, two products for the gradients.

Two buffers hold a chunk's logits of both models; the row kernel leaves the gradient in the student's, not divided by
the number of rows, so that it is of order 1 and nothing underflows in 16 bits. How many rows a chunk has depends on the
workspace alone: products of few rows would be slow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern._dense import product
from llmkern.ops.linear_kl_div.arguments import NAME, Arguments, fake

# Each chunk reads and writes the whole gradient of the weight once, which few rows do not pay for.
LEAST_ROWS, MOST_ROWS = 64, 2048
CPU_WORKSPACE_MB, GPU_WORKSPACE_MB = 64, 1024
# Classes whose part of a weight or its gradient is converted, or multiplied in fp32, at a time: what `product` makes
# of them, which writes to new memory alone, stays in the cache.
BLOCK = 1024


def run(row_kernel: Callable[..., Tensor], *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op; see `fake` for what it returns, and `reference.rows` for what `row_kernel` does."""
    a = Arguments(*args)  # type: ignore[arg-type]
    classes, options = a.classes, a.row_options()
    chosen = counted_rows(a)
    _check_indices(a, chosen)
    count = a.hidden.shape[0] if chosen is None else len(chosen)
    sums, grad_hidden, grad_weight, grad_bias = fake(a)
    grad_weight.zero_()
    grad_bias.zero_()
    if chosen is not None:
        grad_hidden.zero_()
    weight, bias = a.weight[:classes], None if a.bias is None else a.bias[:classes]
    step = rows_per_chunk(a, count)
    student_logits, teacher_logits = (
        None if dtype is None else a.hidden.new_empty((step, classes), dtype=dtype) for dtype in logits_dtypes(a)
    )
    assert student_logits is not None
    total = torch.zeros(3, dtype=torch.float64, device=a.hidden.device)
    for start in range(0, count, step):
        at: slice | Tensor = slice(start, min(start + step, count))
        if chosen is not None:
            at = chosen[at]
        x = a.hidden[at]
        student = logits(x, weight, bias, student_logits[: len(x)])
        teacher = None
        if a.teacher_hidden is not None and a.teacher_weight is not None and teacher_logits is not None:
            teacher_bias = None if a.teacher_bias is None else a.teacher_bias[:classes]
            teacher = logits(a.teacher_hidden[at], a.teacher_weight[:classes], teacher_bias, teacher_logits[: len(x)])
        parts = (None if part is None else part[at].contiguous() for part in (a.indices, a.log_probs, a.labels))
        total += row_kernel(student, teacher, *parts, options).sum(0, dtype=torch.float64)
        d = student.to(x.dtype)
        need_hidden, need_weight, need_bias = a.needs
        if need_hidden and isinstance(at, Tensor):
            grad_hidden.index_copy_(0, at, hidden_gradient(d, weight, torch.empty_like(x)))
        elif need_hidden:
            hidden_gradient(d, weight, grad_hidden[at])
        if need_weight:
            add_product(grad_weight[:classes], d, x)
        if need_bias:
            grad_bias[:classes] += student.sum(0, dtype=grad_bias.dtype)
    loss = a.divergence_weight * total[:1] + a.ce_weight * total[1:2]
    torch.cat((loss, total, torch.full_like(loss, count)), out=sums)
    return sums, grad_hidden, grad_weight, grad_bias


def counted_rows(a: Arguments) -> Tensor | None:
    """Which rows have a label [n], or None for all; raises ValueError for a label that is no class."""
    if a.labels is None:
        return None
    counts = a.labels != a.ignore_index
    wrong = counts & ((a.labels < 0) | (a.labels >= a.classes))
    if wrong.any():
        raise ValueError(
            f"{NAME}: labels must be ignore_index={a.ignore_index} or in [0, {a.classes}), "
            f"got {int(a.labels[wrong][0])}"
        )
    chosen = counts.nonzero()[:, 0]
    return None if len(chosen) == len(counts) else chosen


def _check_indices(a: Arguments, chosen: Tensor | None) -> None:
    if a.indices is None:
        return
    indices = a.indices if chosen is None else a.indices[chosen]
    wrong = (indices < 0) | (indices >= a.classes)
    if wrong.any():
        raise ValueError(f"{NAME}: indices must be in [0, V={a.classes}), got {int(indices[wrong][0])}")


def logits_dtypes(a: Arguments) -> tuple[torch.dtype, torch.dtype | None]:
    """Of the student's and the teacher's logits; None where the teacher has none."""
    student = a.logits_dtype or a.hidden.dtype
    if a.teacher_hidden is None:
        return student, None
    return student, torch.promote_types(a.teacher_hidden.dtype, a.logits_dtype or a.teacher_hidden.dtype)


def rows_per_chunk(a: Arguments, count: int) -> int:
    """As many rows as have their logits in the workspace, in chunks of like size."""
    megabytes = a.workspace_mb or (CPU_WORKSPACE_MB if a.hidden.is_cpu else GPU_WORKSPACE_MB)
    row_bytes = a.classes * sum(dtype.itemsize for dtype in logits_dtypes(a) if dtype)
    most = min(max(megabytes * 1_000_000 // row_bytes, LEAST_ROWS), MOST_ROWS)
    chunks = max(-(-count // most), 1)
    return max(-(-count // chunks), 1)


def logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x [C, H] @ weight [V, H]ᵀ + bias into out [C, V], whose dtype may be wider than x's."""
    if _fp32_on_host(out):
        wide = x.float()
        for block, part in zip(weight.split(BLOCK), out.split(BLOCK, dim=1), strict=True):
            part.copy_(product(wide, block.float().t()))
    elif out.dtype == torch.float64 != x.dtype:
        torch.mm(x.double(), weight.double().t(), out=out)
    elif out.dtype != x.dtype:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    elif bias is None:
        return torch.mm(x, weight.t(), out=out)
    else:
        return torch.addmm(bias, x, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def hidden_gradient(d: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """d [C, V] @ weight [V, H] into out [C, H], all of one dtype; returns out."""
    if not _fp32_on_host(out):
        return torch.mm(d, weight, out=out)
    out.zero_()
    for block, part in zip(weight.split(BLOCK), d.split(BLOCK, dim=1), strict=True):
        out += product(part, block)
    return out


def add_product(total: Tensor, d: Tensor, x: Tensor) -> None:
    """total [V, H] += d [C, V]ᵀ @ x [C, H]; total is fp32 where d and x are of 16 bits."""
    if _fp32_on_host(total):
        for block, part in zip(total.split(BLOCK), d.split(BLOCK, dim=1), strict=True):
            block += product(part.t(), x)
    elif total.dtype == x.dtype:
        total.addmm_(d.t(), x)
    else:
        torch.addmm(total, d.t(), x, out_dtype=total.dtype, out=total)


def _fp32_on_host(out: Tensor) -> bool:
    """Whether torch's own product is the slower one."""
    return out.is_cpu and out.dtype == torch.float32


def scaled(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """kept * factor, a scalar, in dtype; without another tensor of kept's size where dtype is narrower."""
    if kept.dtype == dtype:
        return kept * factor
    result = torch.empty_like(kept, dtype=dtype)
    for block, part in zip(result.split(BLOCK), kept.split(BLOCK), strict=True):
        block.copy_(part * factor)
    return result
