"""linear_kl_div: every kernel against float64 autograd on logits that are held whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import LossCase
from torch import Tensor

import llmkern
from llmkern.ops import DistillLoss

STUDENT = ("student_hidden", "student_weight", "student_bias")


def graded(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors, the student's as leaves that want a gradient."""
    return {name: x.clone().requires_grad_() if name in STUDENT else x for name, x in tensors.items()}


def assert_right(
    found: DistillLoss, leaves: dict[str, Any], wanted: DistillLoss, grads: dict[str, Tensor], tolerance: float
) -> None:
    """Values and gradients are right up to `tolerance` of the largest, and what has no gradient is detached."""
    scale = 1 + abs(float(wanted.loss.detach())) if wanted.loss.isfinite() else 1.0
    for name, mine, right in zip(DistillLoss._fields, found, wanted, strict=True):
        assert mine.requires_grad == (name == "loss"), name
        assert mine.ndim == 0
        assert_close(name, mine, right, tolerance * scale)
    found.loss.backward()
    for name, right in grads.items():
        mine = leaves[name].grad
        assert mine.dtype == leaves[name].dtype
        assert mine.shape == right.shape
        assert_close(name, mine, right, tolerance * float(right.abs().max() if right.numel() else 0))


def assert_close(name: str, found: Tensor, wanted: Tensor, atol: float) -> None:
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=0, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.of_ops("linear_kl_div")
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(op: str, row: str, case: LossCase, generator: torch.Generator) -> None:
    tensors = case.tensors(generator)
    wanted, grads = case.exact(tensors)
    leaves = graded(tensors)
    with llmkern.force(row):
        found = case.call(leaves)
    assert_right(found, leaves, wanted, grads, 1e-3 if case.close else 5e-6)


@pytest.mark.of_ops("linear_kl_div")
def test_float64(op: str, row: str, case: LossCase, generator: torch.Generator) -> None:
    if row != "reference":
        pytest.skip("kernels for rows of fp64 logits: only the reference")
    tensors = case.tensors(generator, torch.float64)
    if case.k:
        tensors["log_probs"] = tensors["log_probs"].double()
    leaves = graded(tensors)
    found = case.call(leaves)
    assert found.loss.dtype == torch.float64
    assert_right(found, leaves, *case.exact(tensors), 1e-12)
