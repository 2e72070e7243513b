"""What linear_kl_div does with rows of logits, in plain torch: the definition, not a fast path."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
LOW = -1e30  # the least logit and log-probability: two masked classes differ by 0, not by a NaN


class RowOptions(NamedTuple):
    """What a row kernel computes. `mix` is the share of p in the mixture m = mix p + (1 - mix) q."""

    kind: str
    mix: float
    temperature: float
    divergence_weight: float  # of the divergence in the loss whose gradient is taken
    ce_weight: float
    softcap: float | None
    teacher_softcap: float | None
    tail: bool
    gradient: bool


def rows(
    student: Tensor, teacher: Tensor | None, indices: Tensor | None, log_probs: Tensor | None, labels: Tensor | None,
    options: RowOptions,
) -> Tensor:  # fmt: skip
    """Rows of logits [C, V] of both models, or of the student and log-probabilities [C, k] of classes `indices`.

    Returns [C, 3]: the divergence, the cross-entropy (0 without labels), and 1 where the likeliest classes agree.
    Where `options.gradient`, the gradient of a row's divergence_weight * divergence + ce_weight * cross-entropy
    takes the place of its logits.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    z = capped(student.to(exact), options.softcap)
    lq = log_softmax(z / options.temperature)
    if teacher is not None:
        t = capped(teacher.to(exact), options.teacher_softcap)
        best = t.argmax(-1)
        value, d = divergence(options.kind, options.mix, log_softmax(t / options.temperature), lq)
    else:
        assert indices is not None
        assert log_probs is not None
        best = indices[:, 0]
        value, d = top_k_divergence(indices.long(), log_probs.to(exact), lq, options.tail)
    d *= options.divergence_weight / options.temperature
    cross_entropy = torch.zeros_like(value)
    if labels is not None:
        log_probability = log_softmax(z)
        cross_entropy = -log_probability.gather(1, labels[:, None])[:, 0]
        d += options.ce_weight * log_probability.exp()
        d.scatter_add_(1, labels[:, None], torch.full_like(d[:, :1], -options.ce_weight))
    agreement = (z.argmax(-1) == best).to(exact)
    if options.gradient:
        if options.softcap is not None:
            d *= 1 - (z / options.softcap).clamp_min(-1) ** 2
        student.copy_(d)
    return torch.stack((value, cross_entropy, agreement), dim=1)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), as Gemma's head; a class of logit -inf stays out."""
    if softcap is None:
        return logits
    return (softcap * torch.tanh(logits / softcap)).masked_fill(logits == -torch.inf, -torch.inf)


def log_softmax(logits: Tensor) -> Tensor:
    """Over the last dim, LOW at least."""
    return torch.log_softmax(logits, dim=-1).clamp_min(LOW)


def divergence(kind: str, mix: float, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row [C], and its gradient with respect to the student's scaled logits [C, V].

    For a sum of f(p_i, q_i) that gradient is q_j (g_j - Σ_i q_i g_i) with g = df/dq.
    """
    p, q = lp.exp(), lq.exp()
    if kind == "forward_kl":
        return (p * (lp - lq)).sum(-1), q - p
    if kind == "reverse_kl":
        value, g = q * (lq - lp), lq - lp
    else:
        lm = torch.logaddexp(lp + math.log(mix), lq + math.log(1 - mix))
        if kind == "jsd":
            value, g = mix * p * (lp - lm) + (1 - mix) * q * (lq - lm), (1 - mix) * (lq - lm)
        elif kind == "skew_kl":
            value, g = p * (lp - lm), -(1 - mix) * (lp - lm).exp()
        else:
            value, g = q * (lq - lm), lq - lm - (1 - mix) * (lq - lm).exp()
    return value.sum(-1), q * (g - (q * g).sum(-1, keepdim=True))


def top_k_divergence(indices: Tensor, log_probs: Tensor, lq: Tensor, tail: bool) -> tuple[Tensor, Tensor]:
    """KL(p || q) over the classes `indices` [C, k] and, if asked for, one more class of all others; and its gradient.

    An entry of log-probability -inf is left out, as if its class were not listed.
    """
    listed = log_probs > -torch.inf
    p, q = log_probs.exp(), lq.exp()
    value = torch.where(listed, p * (log_probs - lq.gather(1, indices)), 0).sum(-1)
    dense = torch.zeros_like(lq).scatter_add_(1, indices, p)
    mass = p.sum(-1)
    if tail:
        known = torch.zeros_like(lq).scatter_add_(1, indices, listed.to(lq.dtype)) > 0
        rest = torch.where(known.all(-1), 0, (1 - mass).clamp_min(0))
        log_rest_q = lq.masked_fill(known, LOW).logsumexp(-1)
        value += torch.where(rest > 0, rest * (rest.clamp_min(1e-37).log() - log_rest_q), 0)
        dense += torch.where(known, 0, rest[:, None] * (lq - log_rest_q[:, None]).exp())
        mass += rest
    return value, mass[:, None] * q - dense
