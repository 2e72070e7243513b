"""linear_kl_div: two heads and the divergence of what they predict, with never more than a chunk of the logits.

With p and q the softmax of the teacher's and the student's logits at a temperature, a row's loss is

    divergence_weight * D(p, q) + ce_weight * cross-entropy (of the student, at temperature 1)

Its gradient is computed with it, chunk by chunk (chunks.py), so that neither the logits nor their gradient are kept.
The op returns sums over rows and the gradients of sums[0]: `backward` only scales them. The public functions are in
functions.py. A kernel of this op is what happens to the rows of a chunk of logits; the products are torch's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern._registry import Op
from llmkern.ops import _triton
from llmkern.ops._linear import DTYPE_CODES, pointer
from llmkern.ops.linear_kl_div import chunks
from llmkern.ops.linear_kl_div.arguments import NAME, Arguments, check, fake
from llmkern.ops.linear_kl_div.reference import KINDS, RowOptions, rows


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients of sums[0]."""
    ctx.set_materialize_grads(False)  # zeros like the gradients themselves would double what is held
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.needs = inputs[0].dtype, inputs[-1]


def backward(ctx: Any, grad_sums: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    """The kept gradients times that of sums[0], which alone has one."""
    if torch.is_grad_enabled():  # else a second derivative would lack its largest part, and nobody would see it
        raise RuntimeError(f"{NAME}: second derivatives are not supported (create_graph=True)")
    grads: list[Tensor | None] = [None] * len(Arguments._fields)
    if grad_sums is not None:
        for at, (kept, needed) in enumerate(zip(ctx.saved_tensors, ctx.needs, strict=True)):
            if needed:
                grads[at] = chunks.scaled(kept, grad_sums[0], ctx.dtype)
    return tuple(grads)


def native(function: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op with csrc/cpu/linear_kl_div."""
    return chunks.run(partial(native_rows, function), *args)


def native_rows(
    function: Any, student: Tensor, teacher: Tensor | None, indices: Tensor | None, log_probs: Tensor | None,
    labels: Tensor | None, o: RowOptions,
) -> Tensor:  # fmt: skip
    """Pointers for csrc/cpu/linear_kl_div."""
    n, v = student.shape
    stats = student.new_empty((n, 3), dtype=torch.float32)
    indices = None if indices is None else indices.long()
    log_probs = None if log_probs is None else log_probs.float()
    function(
        student.data_ptr(), DTYPE_CODES[student.dtype], pointer(teacher),
        DTYPE_CODES[student.dtype if teacher is None else teacher.dtype], pointer(indices), pointer(log_probs),
        pointer(labels), stats.data_ptr(), n, v, 0 if indices is None else indices.shape[1], KINDS.index(o.kind),
        o.mix, o.temperature, o.divergence_weight, o.ce_weight, o.softcap or 0.0, o.teacher_softcap or 0.0, o.tail,
        o.gradient, torch.get_num_threads(),
    )  # fmt: skip
    return stats


def rejects_fp64(*args: Any) -> str | None:
    """Why a kernel whose sums are fp32 cannot run."""
    a = Arguments(*args)
    found = {a.hidden.dtype, a.hidden.dtype if a.teacher_hidden is None else a.teacher_hidden.dtype}
    return "computes in fp32, and hidden states are float64" if torch.float64 in found else None


OP: Op = Op(
    "linear_kl_div(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? indices, Tensor? log_probs, Tensor? labels, str kind, float mix, float temperature, "
    "float divergence_weight, float ce_weight, float? softcap, float? teacher_softcap, bool tail, int ignore_index, "
    "int? workspace_mb, ScalarType? logits_dtype, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    check=check,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
)
OP.native(native, rejects=rejects_fp64)
_triton.add_row(OP, rejects_fp64)
OP.kernel("reference", "any")(partial(chunks.run, rows))
