"""How the solvers divide a matrix: the values do not depend on it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llmkern import _dense, _memory, _pages
from llmkern.formats import Int4Weight, Sparse24Int4Weight, Sparse24Weight, _base
from llmkern.solvers import Hessian, columns, gptq, hessian, refit, solution
from llmkern.solvers.descent import Descent
from llmkern.solvers.grid import find_grid


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_large_matrices_are_like_others() -> None:
    like = torch.zeros(1)
    for n, k in ((3, 5), (0, 7), (4096, 2049)):
        matrix = _pages.large_empty(n, k, like=like)
        assert (matrix.shape, matrix.dtype, matrix.is_contiguous()) == ((n, k), torch.float32, True)
        assert float(matrix.fill_(2).sum()) == 2 * n * k
    other = matrix.clone()
    part = matrix[1:]
    del matrix  # its memory stays for its part
    another = _pages.large_empty(4096, 2049, like=like).fill_(3)
    assert float(part[-1].sum()) == float(other[-1].sum()) == 2 * 2049
    assert float(another[-1].sum()) == 3 * 2049


def test_memory_of_large_matrices_is_used_again(monkeypatch) -> None:
    like, shape, other = torch.zeros(1), (4096, 2052), (4096, 2056)
    if not hasattr(_pages.mmap, "MADV_HUGEPAGE"):
        pytest.skip("no huge pages here")

    def place(shape: tuple[int, int]) -> int:
        return _pages.large_empty(*shape, like=like).data_ptr()

    def kept() -> list[int]:
        return [len(room) for room in _pages._rooms._free]

    _pages.give_back()
    size, larger = (4 * n * k for n, k in (shape, other))
    monkeypatch.setattr(_memory, "available", lambda: _pages.SHARE * (size + larger))
    first = place(shape)
    assert kept() == [size]
    assert place(shape) == first
    a, b = (_pages.large_empty(*shape, like=like) for _ in range(2))
    assert a.data_ptr() != b.data_ptr()
    assert kept() == []
    place(other)
    assert kept() == [larger]
    del a, b
    assert kept() == [size, size]  # the oldest went: the three are more than may be kept
    _pages.give_back()
    assert kept() == []


@pytest.mark.parametrize("order", [None, "activation"])
@pytest.mark.parametrize("k", [3, 256, 600])
def test_the_factor_is_that_of_the_ordered_matrix(k: int, order: str | None) -> None:
    hessian = Hessian(k).add(random(2 * k, k) * torch.arange(1, k + 1))
    factor = hessian.factor(order, 0.01)
    places = torch.arange(k) if factor.order is None else factor.order
    upper = (factor.unit * factor.diagonal).double()
    wanted = hessian.damped(0.01).double()[places][:, places]
    assert torch.equal(upper, upper.triu())
    assert (upper @ upper.T - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("count", range(1, 10))
def test_feedback_of_any_number_of_blocks(count: int) -> None:
    """When a block begins, its values hold the differences of all columns before it, each once."""
    n, k = 6, 8 * count - 3
    w = random(n, k)
    factor = Hessian(k).add(random(4 * k, k, seed=1)).factor(None, 0.01)
    parts = columns.blocks(k, 8)
    assert len(parts) == count
    state = columns.Feedback(w, factor, parts)
    difference = torch.zeros(n, k, dtype=torch.float64)
    for at in parts:
        wanted = w[:, at] + difference[:, : at.start] @ factor.unit[: at.start, at].double()
        values = state.values[:, at].contiguous()
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.ahead(at), values, rtol=1e-5, atol=1e-5)
        chosen = values.round()
        state.finish(w[:, at].contiguous(), values, chosen)
        difference[:, at] = w[:, at].double() - chosen
        assert torch.equal(state.values[:, at], chosen)
    damped = (factor.unit * factor.diagonal).double()
    energy = (difference @ damped).square().sum() - factor.added * difference.square().sum()
    assert state.undamped() == pytest.approx(float(energy), rel=1e-4)


@pytest.mark.parametrize("rank", [6, 300])
def test_gptq_with_rough_feedback(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss stays what it was, and is the loss; the published order of work knows no bf16."""
    n, k = 300, 640
    x = random(2 * k, rank) @ random(rank, k, seed=1) + random(2 * k, k, seed=2) / 100
    w, state = random(n, k, seed=3), Hessian(k).add(x)
    whole = solution.energy(w, state)
    solved: dict[tuple[str | None, bool], solution.Solution] = {}
    for order in ("static", None, "dynamic"):
        for fast in (False, True):
            monkeypatch.setattr(_dense, "half_is_fast", lambda fast=fast: fast)
            found = solved[order, fast] = gptq(w, state, group_size=64, act_order=order)
            assert found.loss == pytest.approx(solution.energy(w - found.weight, state) / whole, rel=3e-3)
        exact, rough = solved[order, False], solved[order, True]
        assert rough.loss == pytest.approx(exact.loss, rel=0.1 if rank == 6 else 0.03)
        assert torch.equal(exact.weight, rough.weight) == (order == "dynamic")


@pytest.mark.parametrize("k", [1, 255, 257, 700, 1300])
def test_factor_of_any_size(k: int) -> None:
    x = random(k + 50, k)
    matrix = (x.T @ x).double() + torch.eye(k, dtype=torch.float64)
    upper = hessian._upper_by_blocks(matrix.clone())
    assert upper is not None
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper @ upper.T, matrix, rtol=1e-9, atol=1e-9)
    # Equal features, here the first and the last, leave a pivot that is positive, but all rounding.
    if k > 1:
        equal = torch.eye(k)
        equal[0, -1] = equal[-1, 0] = 1
        equal[0, 0] += torch.finfo(torch.float32).eps
        assert hessian._upper_by_blocks(equal) is None


@pytest.mark.parametrize(("again", "k"), [(False, 700), (True, 700), (True, 1700)])
def test_descent_is_column_after_column(again: bool, k: int) -> None:
    n, size = 8, 100
    w = random(n, k)
    damped = Hessian(k).add(random(2 * k, k, seed=1) @ (torch.eye(k) + random(k, k, seed=2) / k**0.5)).damped(0.01)
    grid = find_grid(w, None, bits=4, group_size=size, symmetric=True, clip=None)
    start = grid.nearest(w)
    ours = Descent(damped, again=again).run(start, (w - start) @ damped, grid, None, passes=2)
    q, h = start.double(), damped.double()
    for _ in range(2):
        for j in range(k):
            scale = grid.scales[:, j // size].double()
            best = q[:, j] + (w.double() - q) @ h[:, j] / h[j, j]
            q[:, j] = (best / scale).round().clamp(-8, 7) * scale
    assert ((ours - start).abs() > 1e-6).any(0).float().mean() > 0.5  # most columns have moved somewhere
    assert ((ours - q).abs() < 1e-4).float().mean() > 0.98  # ties fall either way


def test_refit_by_parts_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w, mask = random(50, 60), random(50, 60, seed=1) > 0
    damped = Hessian(60).add(random(200, 60, seed=2)).damped(0.01)
    whole = refit.refit(w, w, mask, damped, 60)
    monkeypatch.setattr(refit, "ROWS", 7)
    torch.testing.assert_close(refit.refit(w, w, mask, damped, 60), whole, rtol=1e-4, atol=1e-5)
    for row in (0, 13, 49):
        kept = mask[row]
        wanted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ w[row])
        torch.testing.assert_close(whole[row, kept], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [3, 700])
def test_rough_energy(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is good for four digits, also where one feature has nearly all of the energy."""
    monkeypatch.setattr(solution, "half_is_fast", lambda: True)
    k = 600
    for greatest in (1, 1000):
        x = random(2 * k, k) @ (torch.eye(k) + random(k, k, seed=1) / k**0.5)
        x[:, 77] *= greatest
        state = Hessian(k).add(x)
        w = random(n, k, seed=2)
        exact = float(((w.double() @ state.raw().double()) * w).sum())
        assert solution.rough_energy(w, state) == pytest.approx(exact, rel=1e-3 if n < 100 else 1e-4)
        assert solution.energy(w, state) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("k", [64, 70])
def test_packing_by_parts_of_rows(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(37, k)
    mask = torch.ones(37, k, dtype=torch.bool)
    mask[:, 1::4] = mask[:, 2::4] = False

    def pack() -> list[torch.Tensor]:
        packed = (
            Int4Weight.pack(w, group_size=32, symmetric=False),
            Sparse24Weight.pack(w * mask),
            Sparse24Weight.pack(w * mask, mask=mask, dtype=torch.int8),
            Sparse24Int4Weight.pack(w * mask, mask=mask, group_size=32),
        )
        return [tensor for weight in packed for tensor in weight.tensors().values()]

    whole = pack()
    assert solution.is_24(mask)
    monkeypatch.setattr(_base, "PART", 5 * k)
    assert len(_base.row_parts(w)) == 8
    assert all(torch.equal(one, other) for one, other in zip(whole, pack(), strict=True))
    mask[33, 4:7] = True
    assert not solution.is_24(mask)
    with pytest.raises(ValueError, match=r"row 33 keeps more than two of columns 4\.\.7"):
        Sparse24Weight.pack(w * mask, mask=mask)
    with pytest.raises(ValueError, match=r"mask must be \[37, "):
        Sparse24Weight.pack(w * mask, mask=mask[:30])


@pytest.mark.parametrize("threads", [1, 3])
def test_side_by_side(threads: int) -> None:
    """Each task alone on one thread, in the caller's modes, results in order; the first error is raised."""
    before, ended = torch.get_num_threads(), []

    def task(number: int) -> tuple[int, int, bool, bool]:
        if number == 1:
            raise ValueError(f"task {number}")
        ended.append(number)
        return number, torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    try:
        torch.set_num_threads(threads)
        for inference, gradients in ((True, False), (False, False), (False, True)):
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                found = _dense.side_by_side(torch.zeros(1), [partial(task, at) for at in (0, 2, 3, 4)])
            assert found == [(at, 1, inference, gradients) for at in (0, 2, 3, 4)]
            assert torch.get_num_threads() == threads
        ended.clear()
        with pytest.raises(ValueError, match="task 1"):
            _dense.side_by_side(torch.zeros(1), [partial(task, at) for at in (0, 1, 2, 3)])
        assert torch.get_num_threads() == threads
        assert 0 in ended
        assert _dense.side_by_side(torch.zeros(1), []) == []
        on_device = torch.zeros(1, device="meta")
        assert _dense.side_by_side(on_device, [torch.get_num_threads]) == [threads]
    finally:
        torch.set_num_threads(before)
