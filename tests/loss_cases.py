"""What linear_kl_div is tested on, and its definition: logits of all rows, in float64, by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.ops import DistillLoss, linear_kl_div, linear_kl_div_topk


@dataclass(frozen=True)
class LossCase:
    """One call. h is the width of both models' hidden states; 0: the hidden states are the logits themselves."""

    rows: int
    h: int
    v: int
    kind: str = "forward_kl"
    more: int = 0  # classes that the teacher has and the student has not
    mix: float = 0.5  # beta or alpha
    temperature: float = 1.0
    t2_scale: bool = True
    ce_weight: float = 0.0
    softcap: float | None = None
    teacher_softcap: float | None = None
    ignored: float | None = None  # share of rows that are ignored; None: no labels
    bias: bool = False
    k: int = 0  # top-k
    tail: bool = True
    close: bool = False  # the teacher is the student, a little changed

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.h}x{self.v}", self.kind, f"T{self.temperature:g}"]
        words += [f"+{self.more}" if self.more else "", f"ce{self.ce_weight}" if self.ce_weight else ""]
        words += [f"cap{self.softcap}" if self.softcap else "", "bias" if self.bias else ""]
        words += [f"{self.ignored}ignored" if self.ignored is not None else "", "close" if self.close else ""]
        words += [f"top{self.k}" if self.k else "", "" if self.tail else "no-tail"]
        return "-".join(word for word in words if word)

    def tensors(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The tensors of the call, by the names of its arguments."""

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        h, vt = self.h or self.v, self.v + self.more
        found: dict[str, Any] = {}
        found["student_hidden"] = (random(self.rows, h) * (1 if self.h else 3)).to(dtype)
        found["student_weight"] = (random(self.v, h) if self.h else torch.eye(self.v)).to(dtype)
        if self.bias:
            found["student_bias"] = random(self.v).to(dtype)
        if self.k:
            logits = 3 * random(self.rows, self.v)
            log_probs, indices = logits.log_softmax(-1).topk(self.k)
            found |= {"indices": indices, "log_probs": log_probs}
        else:
            changed = 0.01 if self.close else 1.0
            base = found["student_hidden"].float() if self.close else torch.zeros(self.rows, h)
            found["teacher_hidden"] = (base + changed * random(self.rows, h) * (1 if self.h else 3)).to(dtype)
            found["teacher_weight"] = (random(vt, h) if self.h else torch.eye(vt, h)).to(dtype)
            if self.close and self.h:
                found["teacher_weight"][: self.v] = found["student_weight"]
            if self.bias:
                found["teacher_bias"] = random(vt).to(dtype)
        if self.ignored is not None:
            labels = torch.randint(0, self.v, (self.rows,), generator=generator)
            gone = torch.rand(self.rows, generator=generator) < self.ignored
            found["labels"] = labels.masked_fill(gone, -100)
        return found

    def options(self) -> dict[str, Any]:
        """The other arguments."""
        found = {"temperature": self.temperature, "t2_scale": self.t2_scale, "ce_weight": self.ce_weight}
        found["softcap"] = self.softcap
        if self.k:
            return found | {"tail": self.tail}
        share = "beta" if self.kind == "jsd" else "alpha"
        return found | {"kind": self.kind, share: self.mix, "teacher_softcap": self.teacher_softcap}

    def call(self, tensors: dict[str, Any], **more: Any) -> DistillLoss:
        """The public function on these tensors."""
        return (linear_kl_div_topk if self.k else linear_kl_div)(**tensors, **self.options(), **more)

    def args(self, tensors: dict[str, Any], needs: tuple[bool, bool, bool] = (True, True, True)) -> tuple[Any, ...]:
        """The arguments of torch.ops.llmkern.linear_kl_div."""
        names = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
        names += ("indices", "log_probs", "labels")
        scale = self.temperature**2 if self.t2_scale else 1.0
        mix = 1 - self.mix if self.kind == "skew_reverse_kl" else self.mix
        return (
            *(tensors.get(name) for name in names), self.kind, mix, self.temperature, scale, self.ce_weight,
            self.softcap, self.teacher_softcap, self.tail, -100, None, None, list(needs),
        )  # fmt: skip

    def exact(self, tensors: dict[str, Any], num_items: float | None = None) -> tuple[DistillLoss, dict[str, Tensor]]:
        """The loss, and the gradients by name, in float64."""
        t = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        leaves = {
            name: t[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias") if name in t
        }
        labels = t.get("labels")
        keep = slice(None) if labels is None else labels != -100
        z = F.linear(t["student_hidden"], t["student_weight"], t.get("student_bias"))[keep]
        z = capped(z, self.softcap)
        if self.k:
            per_row = top_k_loss(z / self.temperature, t["indices"][keep].long(), t["log_probs"][keep], self.tail)
            best = t["indices"][keep][:, 0]
        else:
            other = F.linear(t["teacher_hidden"], t["teacher_weight"], t.get("teacher_bias"))[keep][:, : self.v]
            other = capped(other, self.teacher_softcap)
            best = other.argmax(-1)
            lp, lq = (other / self.temperature).log_softmax(-1), (z / self.temperature).log_softmax(-1)
            per_row = self.divergence(lp, lq)
        items = max(len(z), 1) if num_items is None else num_items
        divergence = per_row.sum() / items
        cross_entropy = torch.tensor(torch.nan)
        loss = divergence * (self.temperature**2 if self.t2_scale else 1)
        if labels is not None:
            cross_entropy = F.cross_entropy(z, labels[keep], reduction="sum") / items
            loss = loss + self.ce_weight * cross_entropy
        agreement = (z.argmax(-1) == best).double().sum() / max(len(z), 1)
        grads = torch.autograd.grad(loss, tuple(leaves.values()))
        return DistillLoss(loss, divergence, cross_entropy, agreement), dict(zip(leaves, grads, strict=True))

    def divergence(self, lp: Tensor, lq: Tensor) -> Tensor:
        """Per row, as the docstring of linear_kl_div has it."""
        p, q = lp.exp(), lq.exp()
        share = {"jsd": self.mix, "skew_kl": self.mix, "skew_reverse_kl": 1 - self.mix}.get(self.kind, 0.5)
        m = share * p + (1 - share) * q
        return {
            "forward_kl": lambda: kl(p, q),
            "reverse_kl": lambda: kl(q, p),
            "jsd": lambda: self.mix * kl(p, m) + (1 - self.mix) * kl(q, m),
            "skew_kl": lambda: kl(p, m),
            "skew_reverse_kl": lambda: kl(q, m),
        }[self.kind]()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row, for probabilities above 0."""
    return (p * (p.log() - q.log())).sum(-1)


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """Gemma's."""
    return z if softcap is None else softcap * (z / softcap).tanh()


def top_k_loss(a: Tensor, indices: Tensor, log_probs: Tensor, tail: bool) -> Tensor:
    """Per row: KL over the listed classes, and that of all others as one class."""
    listed = [[i for i in range(len(row)) if row[i] > -torch.inf] for row in log_probs]
    found = []
    for row, at, lp, keep in zip(a, indices, log_probs, listed, strict=True):
        lq, lp, at = row.log_softmax(-1), lp[keep], at[keep]
        value = (lp.exp() * (lp - lq[at])).sum()
        others = torch.ones(len(row), dtype=torch.bool)
        others[at] = False
        rest = 1 - lp.exp().sum()
        if tail and others.any() and rest > 0:
            value = value + rest * (rest.log() - lq[others].logsumexp(-1))
        found.append(value)
    return torch.stack(found) if found else a.sum(-1)


KL_CASES = [
    LossCase(1, 1, 1),
    LossCase(3, 4, 2),
    LossCase(9, 8, 13, temperature=2.0),
    LossCase(9, 8, 13, kind="reverse_kl", temperature=0.7, more=3),
    LossCase(9, 8, 13, kind="jsd", mix=0.3, ce_weight=0.5, ignored=0.3),
    LossCase(9, 8, 13, kind="skew_kl", mix=0.1, bias=True),
    LossCase(9, 8, 13, kind="skew_reverse_kl", mix=0.1, temperature=3.0, t2_scale=False),
    LossCase(11, 16, 1031, temperature=2.0, ce_weight=0.25, ignored=0.4, softcap=5.0, bias=True),
    LossCase(11, 16, 1031, kind="reverse_kl", ce_weight=1.0, ignored=0.4, teacher_softcap=3.0, more=70),
    LossCase(11, 16, 1031, kind="jsd", temperature=4.0, ce_weight=1.0, ignored=0.1, softcap=30.0, teacher_softcap=30.0),
    LossCase(11, 16, 1031, kind="skew_kl", mix=0.9, temperature=1.5, more=1),
    LossCase(11, 16, 1031, kind="skew_reverse_kl", mix=0.6, ce_weight=0.1, ignored=0.0),
    LossCase(70, 16, 2500, kind="jsd", mix=0.9, close=True),
    LossCase(70, 16, 2500, close=True, ignored=0.7),
    LossCase(70, 16, 2500, kind="reverse_kl", close=True),
    LossCase(5, 8, 40, k=3),
    LossCase(5, 8, 40, k=40),
    LossCase(5, 8, 40, k=3, tail=False),
    LossCase(11, 16, 1031, k=64, temperature=2.0, ce_weight=0.5, ignored=0.3, softcap=6.0, bias=True),
    LossCase(11, 16, 1031, k=1, tail=False, ce_weight=0.5, ignored=0.3, temperature=0.5),
    LossCase(0, 8, 40),
    LossCase(4, 8, 40, ignored=1.0, ce_weight=1.0),
]
