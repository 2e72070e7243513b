"""linear_kl_div: every kernel against float64 autograd on logits that are held whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from loss_cases import KL_CASES, LossCase
from torch import Tensor

import llmkern
from llmkern import _features
from llmkern.ops import DistillLoss, linear_kl_div
from llmkern.ops.linear_kl_div import native_rows, rejects_fp64
from llmkern.ops.linear_kl_div.arguments import Arguments
from llmkern.ops.linear_kl_div.reference import KINDS, rows

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


@pytest.mark.parametrize("case", KL_CASES, ids=str)
def test_float64(case: LossCase, generator: torch.Generator) -> None:
    tensors = case.tensors(generator, torch.float64)
    if case.k:
        tensors["log_probs"] = tensors["log_probs"].double()
    leaves = graded(tensors)
    found = case.call(leaves)
    assert found.loss.dtype == torch.float64
    assert_right(found, leaves, *case.exact(tensors), 1e-12)


# The rows by themselves: what becomes of logits as they are.


def row_kernel(row: str) -> Callable[..., Tensor]:
    """The kernel of a row of the op's table, called as `reference.rows`."""
    if row == "reference":
        return rows
    if row == "triton":
        return import_module("llmkern.ops.linear_kl_div.triton").rows
    return partial(native_rows, getattr(_features.native.linear_kl_div, row.removeprefix("cpu.")))


def run_rows(row: str, case: LossCase, tensors: dict[str, Any], gradient: bool = True) -> tuple[Tensor, Tensor]:
    """stats [C, 3], and what is in the place of the logits, of a case with h = 0."""
    a = Arguments(*case.args(tensors, (gradient,) * 3))
    logits = a.hidden.clone()
    teacher = None if a.teacher_hidden is None else a.teacher_hidden.clone()
    stats = row_kernel(row)(logits, teacher, a.indices, a.log_probs, a.labels, a.row_options())
    assert teacher is None or torch.equal(teacher, a.teacher_hidden)
    return stats, logits


def sized(v: int, at: int) -> list[LossCase]:
    """Cases of v classes, whose options go by `at`."""
    kind, temperature, softcap = KINDS[at % 5], (1.0, 2.5)[at % 2], (4.0, None, None)[at % 3]
    ce_weight, ignored = ((0.5, 0.0), (0.0, 0.0), (0.0, None))[at % 3]
    shared = {"temperature": temperature, "softcap": softcap, "ce_weight": ce_weight, "ignored": ignored}
    return [
        LossCase(2, 0, v, kind, mix=0.2, teacher_softcap=(None, 3.0)[at % 2], **shared),
        LossCase(2, 0, v, k=min(5, v), tail=at % 4 != 0, **shared),
    ]


SIZES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 65, 1023, 1024, 1025, 2051)
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.of_ops("linear_kl_div")
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.usefixtures("poisoned")
def test_rows_of_every_size_and_dtype(op: str, row: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """The sums of all kinds, and the gradient rounded once."""
    for at, v in enumerate(SIZES):
        for case in sized(v, at):
            tensors = case.tensors(generator, dtype)
            wanted, grads = case.exact(tensors, num_items=1)
            stats, d = run_rows(row, case, tensors)
            total = stats.double().sum(0)
            torch.testing.assert_close(total[0], wanted.divergence, rtol=3e-6, atol=3e-6)
            if case.ignored is not None:
                torch.testing.assert_close(total[1], wanted.cross_entropy, rtol=3e-6, atol=3e-6)
            assert total[2] == 2 * wanted.agreement
            right = grads["student_hidden"]
            rounding = 0.5 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
            atol = 6e-6 * max(float(right.abs().max()), 1e-2)
            assert ((d.double() - right).abs() <= 1.01 * rounding * right.abs() + atol).all(), f"{case}"
            without, _ = run_rows(row, case, tensors, gradient=False)
            torch.testing.assert_close(without, stats, rtol=1e-6, atol=1e-6)


@pytest.mark.of_ops("linear_kl_div")
def test_rows_of_every_pair_of_dtypes(op: str, row: str, generator: torch.Generator) -> None:
    case = LossCase(3, 0, 1030, "jsd", mix=0.4)
    for mine, other in itertools.permutations(ROW_DTYPES, 2):
        tensors = case.tensors(generator, mine)
        tensors["teacher_hidden"] = tensors["teacher_hidden"].to(other)
        wanted, _ = case.exact(tensors, num_items=1)
        stats, _ = run_rows(row, case, tensors)
        torch.testing.assert_close(stats[:, 0].sum().double(), wanted.divergence, rtol=3e-6, atol=3e-6)


@pytest.mark.of_ops("linear_kl_div")
@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes_are_as_none(op: str, row: str, kind: str, generator: torch.Generator) -> None:
    """Logits of -inf in both models, capped or not."""
    for softcap, k, dtype in itertools.product((None, 4.0), (0, 6) if kind == "forward_kl" else (0,), ROW_DTYPES):
        case = LossCase(3, 0, 1100, kind, temperature=2.0, softcap=softcap, ce_weight=0.5, ignored=0.0, k=k)
        tensors = case.tensors(generator, dtype)
        masked = {
            name: torch.cat((x, torch.full((3, 7), -torch.inf, dtype=dtype)), 1) if name.endswith("_hidden") else x
            for name, x in tensors.items()
        }
        stats, d = run_rows(row, case, tensors)
        masked_stats, masked_d = run_rows(row, case, masked)
        torch.testing.assert_close(masked_stats, stats, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(masked_d[:, :1100], d, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-6)
        assert (masked_d[:, 1100:] == 0).all()


@pytest.mark.of_ops("linear_kl_div")
@pytest.mark.parametrize("kind", KINDS)
def test_far_apart(op: str, row: str, kind: str) -> None:
    """Probabilities of e^-20000 and e^-100: the limits of each kind, and finite gradients."""
    t = {
        "student_hidden": torch.tensor([[1e4, -1e4, 0.0, 3.0], [50.0, -50.0, 0.0, 0.0]]),
        "teacher_hidden": torch.tensor([[-1e4, 1e4, 0.0, 3.0], [-50.0, 50.0, 0.0, 0.0]]),
        "student_weight": torch.eye(4), "teacher_weight": torch.eye(4),
    }  # fmt: skip
    stats, d = run_rows(row, LossCase(2, 0, 4, kind, mix=0.3 if kind == "jsd" else 0.1), t)
    wanted = {"forward_kl": (2e4, 100.0), "reverse_kl": (2e4, 100.0), "jsd": (0.6108643, 0.6108643)}
    torch.testing.assert_close(stats[:, 0], torch.tensor(wanted.get(kind, (2.3025851, 2.3025851))))
    assert (stats[:, 2] == 0).all()
    assert d.isfinite().all()
    torch.testing.assert_close(d.sum(-1), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.of_ops("linear_kl_div")
def test_a_nan_stays_in_its_row(op: str, row: str, generator: torch.Generator) -> None:
    for case in (
        LossCase(3, 0, 70, "jsd"),
        LossCase(3, 0, 70),
        LossCase(3, 0, 70, softcap=3.0),
        LossCase(3, 0, 70, k=4),
    ):
        for at in (3, 69):
            tensors = case.tensors(generator)
            tensors["student_hidden"][1, at] = torch.nan
            stats, d = run_rows(row, case, tensors)
            assert stats[1, 0].isnan()
            assert d[1].isnan().sum() >= 65
            assert stats[::2].isfinite().all()
            assert d[::2].isfinite().all()


@pytest.mark.of_ops("linear_kl_div")
def test_what_is_little_left_of_the_mass_keeps_its_digits(op: str, row: str) -> None:
    """Top-k: classes that are not listed have 1e-9 of the student's mass, and a tenth of the teacher's."""
    logits = torch.tensor([[20.0, -1.0, -0.5, 0.5, 19.0]])
    case = LossCase(1, 0, 5, k=2)
    t = {"student_hidden": logits, "student_weight": torch.eye(5)}
    t |= {"indices": torch.tensor([[0, 4]]), "log_probs": torch.tensor([[0.6, 0.3]]).log()}
    wanted, grads = case.exact(t)
    stats, d = run_rows(row, case, t)
    torch.testing.assert_close(stats[0, 0].double(), wanted.divergence, rtol=1e-6, atol=0)
    torch.testing.assert_close(d.double(), grads["student_hidden"], rtol=1e-5, atol=1e-7)


@pytest.mark.of_ops("linear_kl_div")
def test_equal_logits_agree_on_the_first(op: str, row: str) -> None:
    for v in (3, 40, 2100):
        t = {"student_hidden": torch.zeros(2, v), "student_weight": torch.eye(v)}
        dense = t | {"teacher_hidden": torch.zeros(2, v), "teacher_weight": torch.eye(v)}
        dense["teacher_hidden"][1, v - 1] = 1.0
        assert run_rows(row, LossCase(2, 0, v), dense)[0][:, 2].tolist() == [1, 0]
        top = t | {"indices": torch.tensor([[0, 2], [2, 0]]), "log_probs": torch.full((2, 2), -1.0)}
        assert run_rows(row, LossCase(2, 0, v, k=2), top)[0][:, 2].tolist() == [1, 0]
        top["indices"] = torch.tensor([[1, 2], [0, 2]])  # the first row does not list class 0
        assert run_rows(row, LossCase(2, 0, v, k=2), top)[0][:, 2].tolist() == [0, 1]


@pytest.mark.of_ops("linear_kl_div")
def test_rows_do_not_depend_on_threads(op: str, row: str, generator: torch.Generator) -> None:
    if row == "reference":
        pytest.skip("torch's own sums: no promise of ours")
    for case in (LossCase(33, 0, 1500, "jsd"), LossCase(33, 0, 1500, k=9)):
        tensors, results = case.tensors(generator), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run_rows(row, case, tensors))
        finally:
            torch.set_num_threads(1)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("student", [True, False])
def test_fp64_is_the_references(student: bool) -> None:
    """Of either model."""
    double, single = (torch.ones(2, 3, dtype=torch.float64),) * 2, (torch.ones(2, 3),) * 2
    pairs = (double, single) if student else (single, double)
    args = LossCase(2, 3, 2).args(
        dict(zip(("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"), sum(pairs, ()), strict=True))
    )
    assert "float64" in rejects_fp64(*args)
    assert llmkern._registry.OPS["linear_kl_div"].pick(*args).name == "reference"
    assert float(linear_kl_div(*pairs[0], *pairs[1]).loss) == 0.0
