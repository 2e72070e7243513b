"""linear_kl_div and linear_kl_div_topk as users call them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.ops.linear_kl_div import OP
from llmkern.ops.linear_kl_div.arguments import NAME


class DistillLoss(NamedTuple):
    """What a distillation loss is made of: 0-d tensors, fp32 (fp64 for fp64 inputs). Only `loss` has a gradient."""

    loss: Tensor  # the weighted sum of the next two
    divergence: Tensor  # mean over the rows that count, in nats, without the factor T²
    cross_entropy: Tensor  # mean over the rows that count, in nats, at temperature 1; NaN without labels
    agreement: Tensor  # share of the rows that count whose likeliest class is the teacher's


def linear_kl_div(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    labels: Tensor | None = None, *, kind: str = "forward_kl", beta: float = 0.5, alpha: float = 0.1,
    temperature: float = 1.0, t2_scale: bool = True, ce_weight: float = 0.0, student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, softcap: float | None = None, teacher_softcap: float | None = None,
    ignore_index: int = -100, num_items: int | Tensor | None = None, workspace_mb: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> DistillLoss:  # fmt: skip
    """The distillation loss of a student's head, without ever holding the logits of all rows.

    With p and q the softmax of the teacher's and the student's logits at `temperature` T, the loss is the mean over
    rows of T² D(p, q) + ce_weight * cross-entropy, where D is, by `kind`,

        "forward_kl"       KL(p || q)
        "reverse_kl"       KL(q || p)
        "jsd"              beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
        "skew_kl"          KL(p || alpha p + (1 - alpha) q)
        "skew_reverse_kl"  KL(q || alpha q + (1 - alpha) p)

    and T² (Hinton et al., arXiv 1503.02531) is left out with t2_scale=False. jsd is GKD's (arXiv 2306.13649), the
    skewed ones DistiLLM's (arXiv 2402.03898).

    student_hidden [..., H] and student_weight [V, H], of one dtype: fp32, bf16, fp16 or fp64; under autocast they
    are cast to its dtype. teacher_hidden [..., Ht] and teacher_weight [Vt, Ht], which have no gradient, may be of
    another dtype, and Vt may differ from V: only the first min(V, Vt) classes of both then count. Biases are [V] and
    [Vt]. softcap c makes logits c tanh(logit / c).
    labels int64 [...], one per row as it stands (nothing is shifted); rows whose label is ignore_index count nowhere
    and cost nothing. Without labels all rows count. `num_items`, an int or a 0-d tensor, divides the sums instead of
    the number of rows that count (gradient accumulation). With no row that counts the loss is 0, its gradients zeros.

    Gradients go to student_hidden, student_weight and student_bias, as far as they want one: a frozen head costs none.
    They are computed with the loss, added up in fp32, and held until backward (the weight's as fp32 [V, H]). There are
    no second derivatives.
    `workspace_mb` bounds the two buffers of logits (None: 64 MB on a CPU, 1024 MB on a GPU), but they hold 64 rows at
    least. logits_dtype: that of the hidden states (None), or fp32. Logits rounded to bf16 add 2e-4 to 1e-3 nats to a
    divergence, which shows where student and teacher are close.

    Raises ValueError for shapes, values and devices that do not fit, TypeError for dtypes, before any work is done.
    """
    mix = _mix(kind, beta, alpha)
    _check_rows("teacher_hidden", teacher_hidden, student_hidden)
    teacher = tuple(_autocast(x) for x in (teacher_hidden, teacher_weight, teacher_bias))
    return _loss(
        (student_hidden, student_weight, student_bias), teacher, (None, None), labels, num_items, kind, mix,
        temperature, t2_scale, ce_weight, softcap, teacher_softcap, True, ignore_index, workspace_mb, logits_dtype,
    )  # fmt: skip


def linear_kl_div_topk(
    student_hidden: Tensor, student_weight: Tensor, indices: Tensor, log_probs: Tensor, labels: Tensor | None = None,
    *, tail: bool = True, temperature: float = 1.0, t2_scale: bool = True, ce_weight: float = 0.0,
    student_bias: Tensor | None = None, softcap: float | None = None, ignore_index: int = -100,
    num_items: int | Tensor | None = None, workspace_mb: int | None = None, logits_dtype: torch.dtype | None = None,
) -> DistillLoss:  # fmt: skip
    """`linear_kl_div` of kind "forward_kl" against k log-probabilities per row that a teacher left.

    indices [..., k], int32 or int64 in [0, V), distinct in a row, the likeliest first (`agreement` is with it).
    log_probs [..., k] of any floating dtype: the teacher's log-probabilities at `temperature`; an entry of -inf is
    left out (padding), whatever its index. tail=True: all classes that are not listed are one more class, with what is
    left of the teacher's mass. tail=False: only the listed ones are summed, as for log-probabilities of k samples that
    sum to 1 (arXiv 2503.16870).
    The rest, and the errors, are as in `linear_kl_div`; indices out of range are a ValueError.
    """
    _check_rows("indices", indices, student_hidden)
    _check_rows("log_probs", log_probs, student_hidden)
    return _loss(
        (student_hidden, student_weight, student_bias), (None, None, None), (indices, log_probs), labels, num_items,
        "forward_kl", 0.5, temperature, t2_scale, ce_weight, softcap, None, tail, ignore_index, workspace_mb,
        logits_dtype,
    )  # fmt: skip


def _loss(
    student: tuple[Tensor, Tensor, Tensor | None], teacher: tuple[Tensor | None, ...],
    top_k: tuple[Tensor | None, Tensor | None], labels: Tensor | None, num_items: int | Tensor | None, kind: str,
    mix: float, temperature: float, t2_scale: bool, ce_weight: float, softcap: float | None,
    teacher_softcap: float | None, tail: bool, ignore_index: int, workspace_mb: int | None,
    logits_dtype: torch.dtype | None,
) -> DistillLoss:  # fmt: skip
    """The op on rows, and what its sums mean."""
    _check_num_items(num_items)
    hidden, weight, bias = (_autocast(x) for x in student)
    assert hidden is not None
    if labels is not None:
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{NAME}: labels must be {list(hidden.shape[:-1])}, one per row of student_hidden "
                f"{list(hidden.shape)}, got {list(labels.shape)}"
            )
        labels = labels.reshape(-1)
    graded = torch.is_grad_enabled()
    sums = OP(
        _rows(hidden), weight, bias, _rows(teacher[0]), *teacher[1:], *(_rows(x) for x in top_k), labels, kind, mix,
        float(temperature), float(temperature) ** 2 if t2_scale else 1.0, float(ce_weight), softcap, teacher_softcap,
        tail, ignore_index, workspace_mb, logits_dtype,
        [graded and x is not None and x.requires_grad for x in (hidden, weight, bias)],
    )[0]  # fmt: skip
    counted = sums[4].detach().clamp_min(1)
    items = counted if num_items is None else num_items
    _, divergence, cross_entropy, agreement, _ = sums.detach().unbind()
    if labels is None:
        cross_entropy = torch.full_like(cross_entropy, torch.nan)
    return DistillLoss(sums[0] / items, divergence / items, cross_entropy / items, agreement / counted)


def _mix(kind: str, beta: float, alpha: float) -> float:
    """The share of p in the mixture."""
    for label, share in (("beta", beta), ("alpha", alpha)):
        if not 0 < share < 1:
            raise ValueError(f"{NAME}: {label} must be between 0 and 1, both excluded, got {share}")
    return {"jsd": beta, "skew_kl": alpha, "skew_reverse_kl": 1 - alpha}.get(kind, 0.5)


def _rows(x: Tensor | None) -> Tensor | None:
    """[..., n] as [R, n]; a vector is one row."""
    return None if x is None else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _autocast(x: Tensor | None) -> Tensor | None:
    """x as torch.nn.functional.linear would take it here."""
    if x is None or x.dtype == torch.float64 or not torch.amp.is_autocast_available(x.device.type):
        return x
    enabled = torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if enabled else x


def _check_rows(label: str, x: Tensor, hidden: Tensor) -> None:
    """Raise unless x has hidden's leading dims."""
    if hidden.ndim == 0 or x.ndim == 0 or x.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{NAME}: {label} must have the leading dims of student_hidden {list(hidden.shape)}, got {list(x.shape)}"
        )


def _check_num_items(num_items: int | Tensor | None) -> None:
    """Raise unless num_items is None, positive, or a 0-d tensor (whose value on a GPU would have to be waited for)."""
    if isinstance(num_items, Tensor):
        if num_items.ndim:
            raise ValueError(f"{NAME}: num_items must be a number or a 0-d tensor, got {list(num_items.shape)}")
        if not num_items.is_cpu or torch.compiler.is_compiling():
            return
    if num_items is not None and num_items <= 0:
        raise ValueError(f"{NAME}: num_items must be positive, got {num_items}")
