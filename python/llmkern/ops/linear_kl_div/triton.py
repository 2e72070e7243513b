"""Rows of linear_kl_div in Triton: a program per row, which reads it two or three times.

The passes are those of csrc/cpu/linear_kl_div: the sums of both softmaxes; the divergence and Σ_i q_i g_i; the gradient
q_j (g_j - Σ_i q_i g_i) in the place of the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._tiles import power_of_two
from llmkern.ops.linear_kl_div import chunks
from llmkern.ops.linear_kl_div.reference import KINDS, RowOptions

MOST_BLOCK, WARPS = 2048, 8  # classes of a row that a program holds: 8 of a thread, 16 bytes of bf16
LOW = tl.constexpr(-1e30)  # as in reference.py
FORWARD_KL = tl.constexpr(KINDS.index("forward_kl"))
REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))
JSD = tl.constexpr(KINDS.index("jsd"))
SKEW_KL = tl.constexpr(KINDS.index("skew_kl"))


@triton.jit
def scaled(raw, temperature, softcap):
    """Capped logits over the temperature, LOW at least."""
    raw = raw.to(tl.float32)
    x = raw
    if softcap is not None:
        share = raw / softcap
        size = tl.abs(share)
        square = share * share
        # A difference of 1 and e would lose the digits of small logits.
        series = 1.0 + square * (-0.33333285 + square * (0.13330898 + square * (-0.053535227 + square * 0.018669225)))
        e = tl.exp(-2.0 * size)
        large = (1.0 - e) / (1.0 + e)
        x = softcap * tl.where(size < 0.4, share * series, tl.where(share < 0, -large, large))
    return tl.where(raw <= LOW, LOW, x / temperature)


@triton.jit
def read(row, start, v, temperature, softcap, BLOCK: tl.constexpr):
    """Scaled logits start..start+BLOCK of a row of v; LOW beyond its end."""
    column = start + tl.arange(0, BLOCK)
    return scaled(tl.load(row + column, mask=column < v, other=float("-inf")), temperature, softcap)


@triton.jit
def sums_of(row, v, temperature, softcap, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    """The largest scaled logit m, its class, Σ e^(x - m), and Σ e^(T (x - m)) where PLAIN, else the same sum."""
    most = tl.full([], LOW, tl.float32)
    best = tl.full([], 0, tl.int32)
    total = tl.full([], 0.0, tl.float32)
    plain = tl.full([], 0.0, tl.float32)
    for start in range(0, v, BLOCK):
        x = read(row, start, v, temperature, softcap, BLOCK)
        top, at = tl.max(x, axis=0, return_indices=True)
        best = tl.where(top > most, start + at, best)
        higher = tl.maximum(most, top)
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), axis=0)
        if PLAIN:
            plain = plain * tl.exp((most - higher) * temperature) + tl.sum(tl.exp((x - higher) * temperature), axis=0)
        most = higher
    if not PLAIN:
        plain = total
    return most, best, total, plain


@triton.jit
def write(
    row, start, v, x, d, weight, most, plain, label, ce_weight, temperature, softcap, CE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient: d with respect to scaled logits x, weighted, and the cross-entropy's and the cap's parts."""
    column = start + tl.arange(0, BLOCK)
    d *= weight
    if CE:
        d += ce_weight * (tl.exp((x - most) * temperature) / plain - tl.where(column == label, 1.0, 0.0))
    if softcap is not None:
        share = tl.maximum(x * temperature / softcap, -1.0)  # a masked class has LOW
        d *= 1.0 - share * share
    tl.store(row + column, d.to(row.dtype.element_ty), mask=column < v)


@triton.jit
def terms(lp, lq, mix, log_ratio, log_rest, KIND: tl.constexpr):
    """f(p, q) and df/dq of each class. log_ratio: log(mix / (1 - mix)), log_rest: log(1 - mix)."""
    q = tl.exp(lq)
    if KIND == REVERSE_KL:
        return q * (lq - lp), lq - lp
    rest = 1.0 - mix
    # log(m / q) = log(mix e^(lp - lq) + 1 - mix); beyond e^80 nothing of it changes.
    apart = tl.clamp(lp - lq, -80.0, 80.0)
    s = apart + log_ratio
    above = log_rest + tl.maximum(s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s)))
    if KIND == JSD:
        return mix * tl.exp(lp) * (apart - above) - rest * q * above, -rest * above
    elif KIND == SKEW_KL:
        return tl.exp(lp) * (apart - above), -rest * tl.exp(apart - above)
    else:
        return -q * above, -above - rest * tl.exp(-above)


@triton.jit
def dense_rows(
    student, teacher, labels, stats, v, mix, log_ratio, log_rest, temperature, weight, ce_weight, softcap,
    teacher_softcap, KIND: tl.constexpr, GRADIENT: tl.constexpr, CE: tl.constexpr, PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) against the teacher's logits."""
    at = tl.program_id(0).to(tl.int64)
    row = student + at * v
    other = teacher + at * v
    most, best, total, plain = sums_of(row, v, temperature, softcap, PLAIN, BLOCK)
    most_t, best_t, total_t, _plain_t = sums_of(other, v, temperature, teacher_softcap, False, BLOCK)
    log_sum = most + tl.log(total)
    log_sum_t = most_t + tl.log(total_t)
    label = 0
    cross_entropy = 0.0
    if labels is not None:
        label = tl.load(labels + at).to(tl.int32)
        logit = scaled(tl.load(row + label), temperature, softcap)
        cross_entropy = (most - logit) * temperature + tl.log(plain)
    value = tl.full([], 0.0, tl.float32)
    shift = tl.full([], 0.0, tl.float32)
    if KIND != FORWARD_KL or not GRADIENT:
        for start in range(0, v, BLOCK):
            lq = read(row, start, v, temperature, softcap, BLOCK) - log_sum
            lp = read(other, start, v, temperature, teacher_softcap, BLOCK) - log_sum_t
            if KIND == FORWARD_KL:
                value += tl.sum(tl.exp(lp) * (lp - lq), axis=0)
            else:
                f, g = terms(lp, lq, mix, log_ratio, log_rest, KIND)
                value += tl.sum(f, axis=0)
                shift += tl.sum(tl.exp(lq) * g, axis=0)
    if GRADIENT:
        tl.debug_barrier()
        for start in range(0, v, BLOCK):
            x = read(row, start, v, temperature, softcap, BLOCK)
            lq = x - log_sum
            lp = read(other, start, v, temperature, teacher_softcap, BLOCK) - log_sum_t
            if KIND == FORWARD_KL:
                p = tl.exp(lp)
                value += tl.sum(p * (lp - lq), axis=0)
                d = tl.exp(lq) - p
            else:
                _f, g = terms(lp, lq, mix, log_ratio, log_rest, KIND)
                d = tl.exp(lq) * (g - shift)
            write(
                row, start, v, x, d, weight, most, plain, label, ce_weight, temperature, softcap, CE, BLOCK
            )  # fmt: skip
    tl.store(stats + 3 * at, value)
    tl.store(stats + 3 * at + 1, cross_entropy)
    tl.store(stats + 3 * at + 2, tl.where(best == best_t, 1.0, 0.0))


@triton.jit
def top_k_rows(
    student, indices, log_probs, labels, stats, v, k, temperature, weight, ce_weight, softcap, TAIL: tl.constexpr,
    GRADIENT: tl.constexpr, CE: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) against the classes that are listed, and one more of all others.

    The listed logits are set aside and -inf is written in their place: see csrc/cpu/linear_kl_div/top_k.inl.
    """
    at = tl.program_id(0).to(tl.int64)
    row = student + at * v
    slot = tl.arange(0, LISTED)
    lp = tl.load(log_probs + at * k + slot, mask=slot < k, other=float("-inf")).to(tl.float32)
    index = tl.load(indices + at * k + slot, mask=slot < k, other=0).to(tl.int32)
    listed = lp > float("-inf")
    logits = scaled(tl.load(row + index, mask=listed, other=float("-inf")), temperature, softcap)
    label = 0
    label_logit = 0.0
    if labels is not None:
        label = tl.load(labels + at).to(tl.int32)
        label_logit = scaled(tl.load(row + label), temperature, softcap)
    tl.debug_barrier()
    tl.store(row + index, tl.full([LISTED], float("-inf"), tl.float32).to(row.dtype.element_ty), mask=listed)
    tl.debug_barrier()
    most_o, best, total_o, plain_o = sums_of(row, v, temperature, softcap, PLAIN, BLOCK)
    top = tl.max(logits, axis=0)
    first = tl.min(tl.where(listed & (logits == top), index, v), axis=0)
    best = tl.where((top > most_o) | ((top == most_o) & (first < best)), first, best)
    most = tl.maximum(top, most_o)
    total = total_o * tl.exp(most_o - most) + tl.sum(tl.where(listed, tl.exp(logits - most), 0.0), axis=0)
    listed_plain = tl.sum(tl.where(listed, tl.exp((logits - most) * temperature), 0.0), axis=0)
    plain = plain_o * tl.exp((most_o - most) * temperature) + listed_plain
    log_sum = most + tl.log(total)
    cross_entropy = 0.0
    if labels is not None:
        cross_entropy = (most - label_logit) * temperature + tl.log(plain)
    p = tl.where(listed, tl.exp(lp), 0.0)
    value = tl.sum(tl.where(listed, p * (lp - (logits - log_sum)), 0.0), axis=0)
    mass = tl.sum(p, axis=0)
    others = most_o > LOW
    log_sum_o = tl.where(others, most_o + tl.log(total_o), 0.0)
    rest = 0.0
    if TAIL:
        rest = tl.where(others, tl.maximum(1.0 - mass, 0.0), 0.0)
        value += tl.where(rest > 0, rest * (tl.log(tl.maximum(rest, 1e-37)) - (log_sum_o - log_sum)), 0.0)
        mass += rest
    if GRADIENT:
        factor = tl.where(others, mass * tl.exp(log_sum_o - log_sum) - rest, 0.0)
        for start in range(0, v, BLOCK):
            x = read(row, start, v, temperature, softcap, BLOCK)
            d = tl.exp(x - log_sum_o) * factor
            write(
                row, start, v, x, d, weight, most, plain, label, ce_weight, temperature, softcap, CE, BLOCK
            )  # fmt: skip
        tl.debug_barrier()
        d = (mass * tl.exp(logits - log_sum) - p) * weight
        if CE:
            d += ce_weight * (tl.exp((logits - most) * temperature) / plain - tl.where(index == label, 1.0, 0.0))
        if softcap is not None:
            share = logits * temperature / softcap
            d *= 1.0 - share * share
        tl.store(row + index, d.to(row.dtype.element_ty), mask=listed)
    tl.store(stats + 3 * at, value)
    tl.store(stats + 3 * at + 1, cross_entropy)
    tl.store(stats + 3 * at + 2, tl.where(best == tl.load(indices + at * k).to(tl.int32), 1.0, 0.0))


def rows(
    student: Tensor, teacher: Tensor | None, indices: Tensor | None, log_probs: Tensor | None, labels: Tensor | None,
    o: RowOptions,
) -> Tensor:  # fmt: skip
    """As `reference.rows`."""
    n, v = student.shape
    stats = student.new_empty((n, 3), dtype=torch.float32)
    weight, block = o.divergence_weight / o.temperature, min(power_of_two(v), MOST_BLOCK)
    ce, plain = labels is not None and o.ce_weight > 0, labels is not None and o.temperature != 1
    if teacher is not None:
        log_rest = math.log1p(-o.mix)
        dense_rows[(n,)](
            student, teacher, labels, stats, v, o.mix, math.log(o.mix) - log_rest, log_rest, o.temperature, weight,
            o.ce_weight, o.softcap, o.teacher_softcap, KIND=KINDS.index(o.kind), GRADIENT=o.gradient, CE=ce,
            PLAIN=plain, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    else:
        assert indices is not None
        top_k_rows[(n,)](
            student, indices, log_probs, labels, stats, v, indices.shape[1], o.temperature, weight, o.ce_weight,
            o.softcap, TAIL=o.tail, GRADIENT=o.gradient, CE=ce, PLAIN=plain, BLOCK=block,
            LISTED=power_of_two(indices.shape[1]), num_warps=WARPS,
        )  # fmt: skip
    return stats


def run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op; see `reference`."""
    return chunks.run(rows, *args)
