"""linear_kl_div on the device against float64 autograd: values, gradients, 16-bit inputs, chunks, logits in fp32."""

from __future__ import annotations

from typing import Any

import on_device
import pytest
import torch
from loss_cases import KL_CASES, LossCase
from on_device import each_kernel
from torch import Tensor

import llmkern
from llmkern.ops import DistillLoss
from llmkern.ops.linear_kl_div import chunks

STUDENT = ("student_hidden", "student_weight", "student_bias")
LARGE = LossCase(300, 128, 40_001, "jsd", ce_weight=0.5, ignored=0.2, bias=True, temperature=2.0)


def moved(tensors: dict[str, Any]) -> dict[str, Any]:
    """On the device, the student's as leaves that want a gradient."""
    there = {name: x.to(on_device.DEVICE) for name, x in tensors.items()}
    return {name: x.detach().clone().requires_grad_() if name in STUDENT else x for name, x in there.items()}


def assert_right(kernel: str, case: LossCase, tensors: dict[str, Any], tolerance: float, **options: Any) -> DistillLoss:
    """Values and gradients, up to `tolerance` of the largest."""
    leaves = moved(tensors)
    with llmkern.force(kernel):
        found = case.call(leaves, **options)
    found.loss.backward()
    wanted, grads = case.exact(tensors)
    for name, mine, right in zip(DistillLoss._fields, found, wanted, strict=True):
        assert_close(name, mine, right, tolerance * (1 + abs(float(wanted.loss.detach()))))
    for name, right in grads.items():
        assert leaves[name].grad.dtype == leaves[name].dtype
        assert_close(name, leaves[name].grad, right, tolerance * float(right.abs().max() if right.numel() else 0))
    return found


def assert_close(name: str, found: Tensor, wanted: Tensor, atol: float) -> None:
    torch.testing.assert_close(
        found.detach().cpu().double(), wanted.detach().double(), rtol=0, atol=atol, equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


@each_kernel("linear_kl_div")
@pytest.mark.parametrize("case", [*KL_CASES, LARGE], ids=str)
def test_values_and_gradients(op: str, kernel: str, case: LossCase, generator: torch.Generator) -> None:
    assert_right(kernel, case, case.tensors(generator), 1e-3 if case.close else 3e-5)


@each_kernel("linear_kl_div")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits(
    op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk and in several, whose sums are fp32; with logits in 16 bits and in fp32."""
    for most in (2048, 64):
        monkeypatch.setattr(chunks, "MOST_ROWS", most)
        for case in (LossCase(150, 64, 1000, "reverse_kl", bias=True, ignored=0.3), LossCase(150, 64, 1000, k=20)):
            tensors = case.tensors(generator, dtype)
            for logits_dtype, tolerance in ((None, 10.0), (torch.float32, 4.0)):
                assert_right(kernel, case, tensors, tolerance * torch.finfo(dtype).eps, logits_dtype=logits_dtype)


@each_kernel("linear_kl_div")
def test_bad_values_are_errors(op: str, kernel: str, generator: torch.Generator) -> None:
    case = LossCase(4, 8, 40, ignored=0.0)
    tensors = case.tensors(generator)
    with llmkern.force(kernel), pytest.raises(ValueError, match=r"or in \[0, 40\), got 40"):
        case.call(moved(tensors | {"labels": tensors["labels"] * 0 + 40}))
