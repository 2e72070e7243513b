"""linear_kl_div as it is called: chunks, memory, what wants a gradient, tracing, odd tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import LossCase
from test_linear_kl_div import STUDENT, assert_close, assert_right, graded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llmkern
from llmkern._registry import OPS
from llmkern.ops import linear_kl_div, linear_kl_div_topk
from llmkern.ops.linear_kl_div import chunks
from llmkern.ops.linear_kl_div.arguments import Arguments
from llmkern.ops.linear_kl_div.reference import rows

OP = OPS["linear_kl_div"]
BOTH = [LossCase(23, 16, 70, "jsd", ce_weight=0.5, ignored=0.3, bias=True, softcap=6.0), LossCase(23, 16, 70, k=9)]


@pytest.fixture(params=[1, 5, 2048])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Chunks of this many rows at most."""
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunks, "MOST_ROWS", request.param)
    return request.param


# Chunks and memory.


@pytest.mark.parametrize("case", BOTH, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_chunks_of_any_size_give_the_same(case: LossCase, step: int, generator: torch.Generator) -> None:
    tensors = case.tensors(generator)
    wanted, grads = case.exact(tensors)
    leaves = graded(tensors)
    assert_right(case.call(leaves), leaves, wanted, grads, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_16_bits(case: LossCase, step: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Against the exact gradients: what rounding of the logits and the gradient to 16 bits leaves."""
    tensors = case.tensors(generator, dtype)
    leaves = graded(tensors)
    wanted, grads = case.exact(tensors)
    found = case.call(leaves)
    assert found.loss.dtype == torch.float32
    assert_right(found, leaves, wanted, grads, 10 * torch.finfo(dtype).eps)


def test_the_workspace_decides_on_the_rows() -> None:
    def step_of(v: int, count: int, **options: Any) -> int:
        hidden = torch.empty(2, 4, dtype=options.pop("dtype", torch.float32))
        weight = torch.empty(1, 4, dtype=hidden.dtype).expand(v, 4)
        args = LossCase(2, 4, v).args(
            {"student_hidden": hidden, "student_weight": weight, "teacher_hidden": hidden, "teacher_weight": weight}
        )
        return chunks.rows_per_chunk(Arguments(*args)._replace(**options), count)

    assert step_of(49152, 2048) == 158  # 162 rows of two fp32 logits in 64 MB, evened out over 13 chunks
    assert step_of(49152, 2048, dtype=torch.bfloat16) == 293
    assert step_of(49152, 2048, workspace_mb=128) == 293
    assert step_of(49152, 2048, workspace_mb=1) == chunks.LEAST_ROWS
    assert step_of(100, 10_000) == 2000  # 2048 at most
    assert step_of(100, 7) == 7
    assert step_of(100, 0) == 1
    assert step_of(49152, 2048, dtype=torch.bfloat16, logits_dtype=torch.float32) == 158
    top_k = {"teacher_hidden": None, "teacher_weight": None}
    assert step_of(49152, 2048, **top_k) == 293


class Allocations(TorchDispatchMode):
    """The tensors that operators return, by their size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and not func.is_view:
                self.bytes.append(x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)])
def test_no_tensor_is_as_large_as_the_logits_of_all_rows(
    dtype: torch.dtype, needs: tuple[bool, bool, bool], generator: torch.Generator
) -> None:
    case = LossCase(640, 8, 1000, ignored=0.1, ce_weight=0.5, bias=True)
    args = Arguments(*case.args(case.tensors(generator, dtype), needs))._replace(workspace_mb=0.01)
    with Allocations() as seen:
        chunks.run(rows, *args)
    # 58 rows of fp32 are what the reference computes with; the kernels have no such tensors.
    assert max(seen.bytes) <= chunks.LEAST_ROWS * 1000 * 4
    if not needs[1]:
        assert 1000 * 8 * 4 not in seen.bytes, "a gradient of the weight that nobody wants"


def test_the_gradient_is_kept_once(generator: torch.Generator) -> None:
    case = LossCase(40, 300, 5000)
    leaves = graded(case.tensors(generator, torch.bfloat16))
    loss = case.call(leaves).loss
    with Allocations() as seen:
        loss.backward()
    weight = 5000 * 300
    assert max(seen.bytes) <= max(2 * weight, 4 * chunks.BLOCK * 300)


# Which gradients.


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_ignored_rows_count_nowhere(case: LossCase, generator: torch.Generator) -> None:
    case = LossCase(**{**case.__dict__, "ignored": 0.5})
    tensors = case.tensors(generator)
    gone = tensors["labels"] == -100
    assert 0 < int(gone.sum()) < 23
    kept = {name: x[~gone] if len(x) == 23 else x for name, x in tensors.items()}
    tensors["student_hidden"][gone] = torch.nan
    leaves, fewer = graded(tensors), graded(kept)
    found, wanted = case.call(leaves), case.call(fewer)
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine, right)
    found.loss.backward()
    wanted.loss.backward()
    assert (leaves["student_hidden"].grad[gone] == 0).all()
    torch.testing.assert_close(leaves["student_hidden"].grad[~gone], fewer["student_hidden"].grad)
    torch.testing.assert_close(leaves["student_weight"].grad, fewer["student_weight"].grad)


@pytest.mark.parametrize("case", [LossCase(0, 8, 40), LossCase(4, 8, 40, "jsd", ignored=1.0, ce_weight=1.0)], ids=str)
def test_without_rows_the_loss_is_0_and_connected(case: LossCase, generator: torch.Generator) -> None:
    for num_items in (None, 7):
        leaves = graded(case.tensors(generator))
        found = case.call(leaves, num_items=num_items)
        found.loss.backward()
        assert (float(found.loss.detach()), float(found.divergence), float(found.agreement)) == (0, 0, 0)
        for name in ("student_hidden", "student_weight"):
            assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name]))


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_num_items(case: LossCase, generator: torch.Generator) -> None:
    tensors = case.tensors(generator)
    mean = case.call(tensors)
    wanted, grads = case.exact(tensors, num_items=100)
    for items in (100, torch.tensor(100), torch.tensor(100.0)):
        leaves = graded(tensors)
        found = case.call(leaves, num_items=items)
        assert_right(found, leaves, wanted, grads, 2e-5)
        assert float(found.agreement) == float(mean.agreement)


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_only_what_wants_a_gradient_gets_one(case: LossCase, generator: torch.Generator) -> None:
    tensors = case.tensors(generator)
    _, grads = case.exact(tensors)
    for wanted in ((), ("student_hidden",), ("student_weight",), tuple(grads)):
        given = {name: x.clone().requires_grad_(name in wanted) if name in grads else x for name, x in tensors.items()}
        seen = []

        class Needs(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if func is OP.op:
                    seen.append([x.numel() for x in result[1:]])  # noqa: B023
                return result

        with Needs():
            loss = case.call(given).loss
        assert seen == [[given[name].numel() if name in wanted else 0 for name in STUDENT]]
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.backward()
        for name in grads:
            assert (given[name].grad is not None) == (name in wanted)
            if name in wanted:
                assert_close(name, given[name].grad, grads[name], 2e-5 * float(grads[name].abs().max()))
        with torch.no_grad(), Needs():
            assert not case.call(given).loss.requires_grad
        assert seen[1] == [0, 0, 0]


def test_a_tied_head(generator: torch.Generator) -> None:
    table = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    teacher = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 50, (11,), generator=generator)
    mine, right = table.clone().requires_grad_(), table.clone().requires_grad_()
    linear_kl_div(F.embedding(tokens, mine).tanh(), mine, teacher, table).loss.backward()
    log_q = (F.embedding(tokens, right).tanh() @ right.T).log_softmax(-1)
    F.kl_div(log_q, (teacher @ table.T).log_softmax(-1), log_target=True, reduction="batchmean").backward()
    torch.testing.assert_close(mine.grad, right.grad)


def test_backward_twice_and_no_second_derivatives(generator: torch.Generator) -> None:
    case = BOTH[0]
    leaves = graded(case.tensors(generator))
    loss = case.call(leaves).loss
    (3 * loss).backward(retain_graph=True)
    first = leaves["student_hidden"].grad.clone()
    loss.backward()
    torch.testing.assert_close(leaves["student_hidden"].grad, first * 4 / 3)
    loss = case.call(leaves).loss
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(loss, leaves["student_hidden"], create_graph=True)


# Tensors of other shapes, layouts and dtypes.


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_layouts(case: LossCase, generator: torch.Generator) -> None:
    case = LossCase(**{**case.__dict__, "rows": 24})
    tensors = case.tensors(generator)
    wanted, grads = case.exact(tensors)

    def odd(x: Tensor) -> Tensor:
        """The same values with other strides."""
        if x.ndim == 1:
            return torch.stack((x, x), 1)[:, 0]
        return x.T.contiguous().T if x.is_floating_point() else torch.cat((x, x), 1)[:, : x.shape[1]]

    leaves = graded({name: odd(x) for name, x in tensors.items()})
    assert_right(case.call(leaves), leaves, wanted, grads, 2e-5)
    shaped = {name: x.reshape(2, 3, 4, *x.shape[1:]) if len(x) == 24 else x for name, x in tensors.items()}
    leaves = graded(shaped)
    found = case.call(leaves)
    grads["student_hidden"] = grads["student_hidden"].reshape(2, 3, 4, -1)
    assert_right(found, leaves, wanted, grads, 2e-5)


def test_one_row(generator: torch.Generator) -> None:
    x, w = torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)
    found = linear_kl_div(x, w, x + 1, w, torch.tensor(3))
    assert torch.equal(found.loss, linear_kl_div(x[None], w, x[None] + 1, w, torch.tensor([3])).loss)


def test_logits_in_fp32_of_bf16_states(generator: torch.Generator) -> None:
    """Student and teacher are close: logits in bf16 have more noise than there is divergence."""
    case = LossCase(60, 32, 5000, close=True, bias=True)
    tensors = case.tensors(generator, torch.bfloat16)
    tensors["student_hidden"] = tensors["student_hidden"] * 2
    tensors["teacher_hidden"] = tensors["teacher_hidden"] * 2
    tensors["teacher_bias"] = tensors["student_bias"]
    leaves = graded(tensors)
    wanted, grads = case.exact(tensors)
    exact = case.call(leaves, logits_dtype=torch.float32)
    torch.testing.assert_close(exact.loss.double(), wanted.loss, rtol=1e-4, atol=0)
    noise = (case.call(tensors).loss - wanted.loss).abs()
    assert noise > 10 * (exact.loss - wanted.loss).abs()
    exact.loss.backward()
    for name, right in grads.items():
        assert_close(name, leaves[name].grad, right, 2e-2 * float(right.abs().max()))


def test_a_teacher_of_another_dtype(generator: torch.Generator) -> None:
    for mine, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        case = LossCase(9, 16, 70, "reverse_kl", more=5)
        tensors = case.tensors(generator, torch.bfloat16)
        given = {name: x.to(other if name.startswith("teacher") else mine) for name, x in tensors.items()}
        wanted, grads = case.exact(tensors)
        leaves = graded(given)
        assert_right(case.call(leaves), leaves, wanted, grads, 3e-2)


def test_logits_in_fp64_of_an_fp32_teacher(generator: torch.Generator) -> None:
    case = LossCase(9, 16, 70, "jsd", bias=True)
    tensors = case.tensors(generator)
    given = {name: x if name.startswith("teacher") else x.double() for name, x in tensors.items()}
    leaves = graded(given)
    assert_right(case.call(leaves, logits_dtype=torch.float64), leaves, *case.exact(tensors), 1e-12)


def test_autocast(generator: torch.Generator) -> None:
    case = BOTH[0]
    tensors = case.tensors(generator)
    narrow = graded({name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()})
    leaves = graded(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.call(leaves)
    wanted = case.call(narrow)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    found.loss.backward()
    wanted.loss.backward()
    for name in STUDENT:
        assert leaves[name].grad.dtype == torch.float32
        assert torch.equal(leaves[name].grad, narrow[name].grad.float())


def test_top_k_of_any_dtype_and_padded(generator: torch.Generator) -> None:
    case = LossCase(6, 8, 50, k=5, temperature=2.0)
    for tail in (True, False):
        case = LossCase(**{**case.__dict__, "tail": tail})
        tensors = case.tensors(generator)
        leaves = graded(tensors)
        wanted = case.call(leaves)
        wanted.loss.backward()
        padded = graded(tensors)
        padded["indices"] = torch.cat((tensors["indices"], torch.zeros(6, 3, dtype=torch.int64)), 1).int()
        padded["log_probs"] = torch.cat((tensors["log_probs"], torch.full((6, 3), -torch.inf)), 1)
        for row in ("reference", None):
            if row is None:
                found = case.call(padded)
            else:
                with llmkern.force(row):
                    found = case.call(padded)
            torch.testing.assert_close(found.loss, wanted.loss)
            padded["student_hidden"].grad = None
            found.loss.backward()
            torch.testing.assert_close(padded["student_hidden"].grad, leaves["student_hidden"].grad)
        half = tensors | {"log_probs": tensors["log_probs"].half()}
        torch.testing.assert_close(case.call(half).loss, wanted.loss, rtol=1e-2, atol=1e-3)


def test_all_classes_listed_are_the_whole_divergence(generator: torch.Generator) -> None:
    x, w = torch.randn(7, 8, generator=generator), torch.randn(30, 8, generator=generator)
    other, head = torch.randn(7, 4, generator=generator), torch.randn(30, 4, generator=generator)
    log_probs, indices = (other @ head.T / 3).log_softmax(-1).sort(descending=True)
    wanted = linear_kl_div(x, w, other, head, temperature=3.0)
    for tail in (True, False):
        found = linear_kl_div_topk(x, w, indices, log_probs, temperature=3.0, tail=tail)
        for mine, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, right, equal_nan=True, rtol=1e-5, atol=1e-6)


# Tracing.


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_opcheck(case: LossCase, generator: torch.Generator) -> None:
    tensors = case.tensors(generator)
    for dtype, needs in ((torch.float32, (True, True, case.bias)), (torch.bfloat16, (True, False, False))):
        given = {
            name: x.detach().to(dtype) if x.is_floating_point() and name != "log_probs" else x
            for name, x in tensors.items()
        }
        for name, wanted in zip(STUDENT, needs, strict=True):
            if wanted:
                given[name] = given[name].clone().requires_grad_()
        torch.library.opcheck(OP.op, case.args(given, needs))


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_compile(case: LossCase, generator: torch.Generator) -> None:
    def step(tensors: dict[str, Any], items: Tensor) -> tuple[Tensor, ...]:
        found = case.call(tensors | {"student_hidden": tensors["student_hidden"] * 1.5}, num_items=items)
        return found.loss * 2, found.agreement

    tensors, items = case.tensors(generator), torch.tensor(17)
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = graded(tensors)
        loss, agreement = call(leaves, items)
        loss.backward()
        results.append([loss, agreement, *(leaves[name].grad for name in ("student_hidden", "student_weight"))])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right)
