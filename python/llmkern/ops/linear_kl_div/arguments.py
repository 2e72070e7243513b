"""What linear_kl_div is called with: its arguments, their check, and the shape of the result."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.ops._linear import FLOATS
from llmkern.ops.gptq_block import check_devices
from llmkern.ops.linear_kl_div.reference import KINDS, RowOptions

NAME = "linear_kl_div"


class Arguments(NamedTuple):
    """The op's arguments. Either the teacher's hidden states and weight are given, or indices and log_probs.

    hidden [R, H], weight [V, H], bias [V]; teacher_hidden [R, Ht], teacher_weight [Vt, Ht], teacher_bias [Vt];
    indices int32 or int64 [R, k], log_probs [R, k]; labels int64 [R]. mix: see RowOptions. needs: whether the
    gradients of hidden, weight and bias are wanted.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    indices: Tensor | None
    log_probs: Tensor | None
    labels: Tensor | None
    kind: str
    mix: float
    temperature: float
    divergence_weight: float
    ce_weight: float
    softcap: float | None
    teacher_softcap: float | None
    tail: bool
    ignore_index: int
    workspace_mb: int | None
    logits_dtype: torch.dtype | None
    needs: list[bool]

    @property
    def classes(self) -> int:
        """How many classes both models have."""
        v = self.weight.shape[0]
        return v if self.teacher_weight is None else min(v, self.teacher_weight.shape[0])

    @property
    def exact(self) -> torch.dtype:
        """The dtype of sums and of what is added up over chunks."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def row_options(self) -> RowOptions:
        """What the row kernel is told."""
        return RowOptions(
            self.kind, self.mix, self.temperature, self.divergence_weight, self.ce_weight, self.softcap,
            self.teacher_softcap, self.tail, any(self.needs),
        )  # fmt: skip


def check(*args: Any) -> Arguments:
    """Raise on arguments whose kinds, shapes, dtypes or devices do not fit; values in tensors are seen later."""
    a = Arguments(*args)
    if a.kind not in KINDS:
        raise ValueError(f"{NAME}: kind must be one of {', '.join(KINDS)}, got {a.kind!r}")
    if a.kind in KINDS[2:] and not 0 < a.mix < 1:
        raise ValueError(f"{NAME}: {a.kind} mixes p and q with a share between 0 and 1, got {a.mix}")
    for label, number in (
        ("temperature", a.temperature), ("softcap", a.softcap), ("teacher_softcap", a.teacher_softcap),
        ("workspace_mb", a.workspace_mb),
    ):  # fmt: skip
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{NAME}: {label} must be a positive number, got {number}")
    if not 0 <= a.ce_weight < float("inf"):
        raise ValueError(f"{NAME}: ce_weight must be 0 or a positive number, got {a.ce_weight}")
    if a.ce_weight and a.labels is None:
        raise ValueError(f"{NAME}: ce_weight={a.ce_weight} needs labels, got None")
    _check_head("student", a.hidden, a.weight, a.bias)
    r = a.hidden.shape[0]
    if a.logits_dtype not in (None, a.hidden.dtype, a.exact):
        raise TypeError(f"{NAME}: logits_dtype must be None, {a.hidden.dtype} or {a.exact}, got {a.logits_dtype}")
    if (a.teacher_hidden is None) != (a.teacher_weight is None) or (a.indices is None) != (a.log_probs is None):
        raise ValueError(f"{NAME}: teacher_hidden needs teacher_weight and indices need log_probs")
    if (a.teacher_hidden is None) == (a.indices is None):
        raise ValueError(f"{NAME}: the teacher is either teacher_hidden and teacher_weight or indices and log_probs")
    if a.teacher_hidden is not None and a.teacher_weight is not None:
        _check_head("teacher", a.teacher_hidden, a.teacher_weight, a.teacher_bias)
        if a.teacher_hidden.shape[0] != r:
            raise ValueError(f"{NAME}: student_hidden has {r} rows, but teacher_hidden has {a.teacher_hidden.shape[0]}")
    if a.indices is not None and a.log_probs is not None:
        _check_top_k(r, a.indices, a.log_probs, a.kind)
    if a.labels is not None:
        if a.labels.dtype != torch.int64:
            raise TypeError(f"{NAME}: labels must be int64, got {a.labels.dtype}")
        if a.labels.shape != (r,):
            raise ValueError(f"{NAME}: labels must be one per row of student_hidden, {r}, got {list(a.labels.shape)}")
    check_devices(
        NAME, a.hidden, student_weight=a.weight, student_bias=a.bias, teacher_hidden=a.teacher_hidden,
        teacher_weight=a.teacher_weight, teacher_bias=a.teacher_bias, indices=a.indices, log_probs=a.log_probs,
        labels=a.labels,
    )  # fmt: skip
    return a


def _check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless hidden [R, H], weight [V, H] and bias [V] fit, V and H above 0, in one floating dtype."""
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{NAME}: {model}_hidden [..., H] and {model}_weight [V, H] with V, H > 0 must have the same H, "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"{NAME}: {model}_hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{NAME}: {model}_hidden is {hidden.dtype}, but {model}_weight is {weight.dtype}")
    if bias is not None and bias.dtype != hidden.dtype:
        raise TypeError(f"{NAME}: {model}_hidden is {hidden.dtype}, but {model}_bias is {bias.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME}: {model}_bias must be [V]=[{weight.shape[0]}], got {list(bias.shape)}")


def _check_top_k(r: int, indices: Tensor, log_probs: Tensor, kind: str) -> None:
    """Raise unless indices and log_probs are [R, k], k > 0."""
    if kind != "forward_kl":
        raise ValueError(f'{NAME}: with indices and log_probs the kind is "forward_kl", got {kind!r}')
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{NAME}: indices must be int32 or int64, got {indices.dtype}")
    if not log_probs.is_floating_point():
        raise TypeError(f"{NAME}: log_probs must be of a floating dtype, got {log_probs.dtype}")
    if indices.ndim != 2 or indices.shape[0] != r or indices.shape[1] == 0 or log_probs.shape != indices.shape:
        raise ValueError(
            f"{NAME}: indices and log_probs must be [{r} rows, k] with k > 0, "
            f"got {list(indices.shape)} and {list(log_probs.shape)}"
        )


def fake(a: Arguments, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sums [5], then the gradients of hidden [R, H], weight [V, H] and bias [V], each empty [0] where not wanted.

    sums: of the loss, the divergence, the cross-entropy (0 without labels) and the agreement over the rows that count,
    and their number. The gradients of weight and bias are in fp32 at least.
    """
    need_hidden, need_weight, need_bias = a.needs
    return (
        a.hidden.new_empty(5, dtype=a.exact),
        a.hidden.new_empty(a.hidden.shape if need_hidden else (0,)),
        a.hidden.new_empty(a.weight.shape if need_weight else (0,), dtype=a.exact),
        a.hidden.new_empty(a.weight.shape[:1] if need_bias else (0,), dtype=a.exact),
    )
