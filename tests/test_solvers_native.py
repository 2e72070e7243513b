"""The native block kernels against their references, on every CPU level: odd sizes, ties, every kind of pruning."""

import pytest
import torch

import llmkern
from llmkern import force, ops
from llmkern.ops.gptq_block.reference import quantize

LEVELS = [row.kernel for row in llmkern.kernels("gptq_block") if row.runnable and row.kernel != "reference"]
SIZES = [(1, 1, 1), (5, 3, 2), (37, 128, 64), (33, 130, 7), (64, 96, 16), (20, 64, 1)]  # n, columns, group size

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native module is not built")


def block(n, b, group_size, *, asymmetric=False):
    generator = torch.Generator().manual_seed(n * b + group_size)
    w = torch.randn(n, b, generator=generator)
    wc = w + 0.1 * torch.randn(n, b, generator=generator)
    v = torch.eye(b) + torch.randn(b, b, generator=generator).triu(1) * 0.1
    count = -(-b // group_size)
    scales = torch.rand(n, count, generator=generator) * 0.2 + 0.1
    zeros = torch.randint(-8, 8, (n, count), dtype=torch.int8, generator=generator) if asymmetric else None
    groups = (torch.randperm(b, generator=generator) // group_size).to(torch.int32)
    return w, wc, v, scales, zeros, groups


def on(level, op, *args):
    with force(level):
        return op(*args)


def assert_rows_agree(got, wanted):
    """A multiply-add rounds once where the reference rounds twice, so a value at a tie may take the other code."""
    close = torch.isclose(got, wanted, rtol=1e-4, atol=1e-4).all(1)
    assert close.float().mean() >= 0.9


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gptq_block(level, size, asymmetric, masked, bits):
    args = block(*size, asymmetric=asymmetric)
    mask = torch.rand(args[0].shape, generator=torch.Generator().manual_seed(0)) < 0.5 if masked else None
    got = on(level, ops.gptq_block, *args, mask, bits)
    assert_rows_agree(got, on("reference", ops.gptq_block, *args, mask, bits))
    if masked:
        assert not got[~mask].any()


PATTERNS = [(0, 1), (2, 4), (1, 3), (4, 8), (5, 16), (64, 64), (3, 5)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize(
    ("size", "pattern"),
    [(size, None) for size in SIZES] + [(size, p) for size in SIZES for p in PATTERNS if size[1] % p[1] == 0],
    ids=str,
)
def test_sparsegpt_block(level, size, pattern, bits):
    w, wc, v, scales, zeros, groups = block(*size)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.5 if pattern is None else None
    diagonal = torch.linspace(0.5, 2, w.shape[1])
    args = (w, wc, v, diagonal, mask, *(pattern or (0, 1)), scales, zeros, groups, bits)
    got, kept = on(level, ops.sparsegpt_block, *args)
    wanted, wanted_kept = on("reference", ops.sparsegpt_block, *args)
    assert (kept == wanted_kept).all(1).float().mean() >= 0.9
    assert_rows_agree(got, wanted)
    assert not got[~kept].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("steps", [1, 7, 50, 130])
def test_scale_search(level, size, steps, bits, symmetric):
    """As little error as the reference's choice: sums in another order may prefer the other of two equal ratios."""
    n, k, group_size = size
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    importance = torch.linspace(0, 3, k)
    args = (w, importance, group_size, bits, symmetric, steps, 0.6)
    got, wanted = on(level, ops.scale_search, *args), on("reference", ops.scale_search, *args)
    if steps == 1:
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])
    errors = []
    for scales, zeros in (got, wanted):
        scale, zero = (grid.repeat_interleave(group_size, 1)[:, :k] for grid in (scales, zeros.float()))
        error = (w - quantize(w, scale, zero, bits)).square() * importance
        errors.append(torch.nn.functional.pad(error, (0, -k % group_size)).view(n, -1, group_size).sum(-1))
    assert (errors[0] <= errors[1] * 1.0001 + 1e-9).all()


@pytest.mark.parametrize("level", LEVELS)
def test_ties_prune_the_first(level):
    w = torch.ones(40, 16)
    args = (w, w, torch.eye(16), torch.ones(16), None, 2, 4, None, None, None, 0)
    _, kept = on(level, ops.sparsegpt_block, *args)
    assert torch.equal(kept, torch.tensor([False, False, True, True]).repeat(40, 4))


@pytest.mark.parametrize("level", LEVELS)
def test_ties_round_to_even(level):
    """Codes of 0.5, 1.5, ... on a scale of 1, and clamping at both ends."""
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 7.5, 9.0, -7.5, -8.5, -30.0]]).repeat(20, 1)
    b = w.shape[1]
    got = on(level, ops.gptq_block, w, w, torch.eye(b), torch.ones(20, 1), None, torch.zeros(b).int(), None, 4)
    assert torch.equal(got[13], torch.tensor([0.0, 2, 2, 0, -2, 6, 7, 7, -8, -8, -8]))


@pytest.mark.parametrize("level", LEVELS)
def test_a_group_of_zeros_has_scale_one(level):
    scales, zeros = on(level, ops.scale_search, torch.zeros(3, 64), torch.ones(64), 64, 4, True, 50, 0.6)
    assert torch.equal(scales, torch.ones(3, 1))
    assert torch.equal(zeros, torch.zeros(3, 1, dtype=torch.int8))


@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_nothing(level):
    args = block(200, 128, 64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(on(level, ops.gptq_block, *args, None, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
