"""What linear_kl_div refuses, before any work is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import LossCase

from llmkern._registry import OPS
from llmkern.ops import linear_kl_div, linear_kl_div_topk
from llmkern.ops.linear_kl_div.arguments import Arguments

X, W = torch.ones(4, 8), torch.ones(10, 8)
INDICES, LOG_PROBS = torch.zeros(4, 2, dtype=torch.int64), torch.full((4, 2), -1.0)
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"kind": "tvd"}, ValueError, "kind must be one of forward_kl, .*got 'tvd'"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a positive number, got nan"),
        ({"beta": 0.0}, ValueError, "beta must be between 0 and 1, both excluded, got 0.0"),
        ({"alpha": 1.0}, ValueError, "alpha must be between 0 and 1, both excluded, got 1.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number, got 0.0"),
        ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be a positive number, got -1.0"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb must be a positive number, got 0"),
        ({"ce_weight": -1.0}, ValueError, "ce_weight must be 0 or a positive number, got -1.0"),
        ({"ce_weight": 1.0, "labels": None}, ValueError, "ce_weight=1.0 needs labels, got None"),
        ({"num_items": 0}, ValueError, "num_items must be positive, got 0"),
        ({"num_items": torch.tensor(-1)}, ValueError, "num_items must be positive, got -1"),
        ({"num_items": torch.ones(2)}, ValueError, r"num_items must be a number or a 0-d tensor, got \[2\]"),
        ({"labels": LABELS.int()}, TypeError, "labels must be int64, got torch.int32"),
        ({"labels": LABELS[:3]}, ValueError, r"labels must be \[4\], one per row of .*, got \[3\]"),
        ({"labels": LABELS + 10}, ValueError, r"labels must be ignore_index=-100 or in \[0, 10\), got 10"),
        ({"labels": LABELS - 1}, ValueError, r"labels must be ignore_index=-100 or in \[0, 10\), got -1"),
        ({"labels": LABELS + 9, "teacher_weight": W[:9]}, ValueError, r"in \[0, 9\), got 9"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta"),
        ({"student_weight": torch.ones(10, 7)}, ValueError, r"student_hidden .* same H, got \[4, 8\] and \[10, 7\]"),
        ({"student_weight": torch.ones(0, 8)}, ValueError, r"V, H > 0 .*got \[4, 8\] and \[0, 8\]"),
        ({"student_weight": W.bfloat16()}, TypeError, "is torch.float32, but student_weight is torch.bfloat16"),
        ({"student_weight": W.to("meta")}, ValueError, "student_weight is on meta"),
        ({"student_bias": torch.ones(9)}, ValueError, r"student_bias must be \[V\]=\[10\], got \[9\]"),
        ({"student_bias": torch.ones(10).half()}, TypeError, "but student_bias is torch.float16"),
        ({"student_hidden": X.int(), "student_weight": W.int()}, TypeError, "student_hidden must be float32, .*int32"),
        ({"teacher_hidden": torch.ones(3, 8)}, ValueError, r"teacher_hidden must have the leading dims .*got \[3, 8\]"),
        ({"teacher_hidden": torch.ones(4, 9)}, ValueError, r"teacher_hidden .* same H, got \[4, 9\] and \[10, 8\]"),
        ({"teacher_weight": W.double()}, TypeError, "teacher_hidden is torch.float32, but teacher_weight is .*64"),
        ({"logits_dtype": torch.bfloat16}, TypeError, "logits_dtype must be None, torch.float32 or .*got .*bfloat16"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"student_hidden": X, "student_weight": W, "teacher_hidden": X, "teacher_weight": W, "labels": LABELS}
    with pytest.raises(error, match=text):
        linear_kl_div(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"indices": INDICES + 10}, ValueError, r"indices must be in \[0, V=10\), got 10"),
        ({"indices": INDICES - 1}, ValueError, r"indices must be in \[0, V=10\), got -1"),
        ({"indices": INDICES.float()}, TypeError, "indices must be int32 or int64, got torch.float32"),
        ({"log_probs": INDICES}, TypeError, "log_probs must be of a floating dtype, got torch.int64"),
        ({"log_probs": LOG_PROBS[:, :1]}, ValueError, r"\[4 rows, k\] with k > 0, got \[4, 2\] and \[4, 1\]"),
        ({"indices": INDICES[:, :0], "log_probs": LOG_PROBS[:, :0]}, ValueError, r"k > 0, got \[4, 0\]"),
        ({"indices": INDICES[:3]}, ValueError, r"indices must have the leading dims .*got \[3, 2\]"),
        ({"log_probs": LOG_PROBS[:3]}, ValueError, r"log_probs must have the leading dims .*got \[3, 2\]"),
        ({"log_probs": LOG_PROBS.to("meta")}, ValueError, "log_probs is on meta"),
        ({"temperature": -1.0}, ValueError, "temperature must be a positive number, got -1.0"),
    ],
)
def test_refusals_of_top_k(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"student_hidden": X, "student_weight": W, "indices": INDICES, "log_probs": LOG_PROBS}
    with pytest.raises(error, match=text):
        linear_kl_div_topk(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"teacher_hidden": None, "teacher_weight": None}, "either teacher_hidden and teacher_weight or indices"),
        ({"indices": INDICES, "log_probs": LOG_PROBS}, "either teacher_hidden and teacher_weight or indices"),
        ({"teacher_weight": None}, "teacher_hidden needs teacher_weight"),
        ({"indices": INDICES}, "indices need log_probs"),
        ({"teacher_hidden": X[:3]}, "student_hidden has 4 rows, but teacher_hidden has 3"),
        ({"labels": LABELS[:3]}, r"one per row of student_hidden, 4, got \[3\]"),
        ({"kind": "jsd", "mix": 1.0}, "jsd mixes p and q with a share between 0 and 1, got 1.0"),
        (
            {"teacher_hidden": None, "teacher_weight": None, "indices": INDICES, "log_probs": LOG_PROBS, "kind": "jsd"},
            "with indices and log_probs the kind is \"forward_kl\", got 'jsd'",
        ),
    ],
)
def test_refusals_of_the_op(changes: dict[str, Any], text: str) -> None:
    given = {"student_hidden": X, "student_weight": W, "teacher_hidden": X, "teacher_weight": W}
    args = Arguments(*LossCase(4, 8, 10).args(given))._replace(**changes)
    with pytest.raises(ValueError, match=text):
        OPS["linear_kl_div"](*args)
