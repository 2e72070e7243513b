"""The sizes of `cuda.ring`, which a test reads without a GPU, and what the kernel refuses."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from cases import BF16, F32, I8, LinearCase
from emulation import GPU

from llmkern.ops import _cuda_ring
from llmkern.ops._cuda import Gpu, active_clusters

INT4 = _cuda_ring.Weights(32, 128, 2048, 128, 2, False, True)
SHAPES = (
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (28672, 8192),
    (1024, 4096),
    (32, 256),
)


def test_plans_fit_and_run_at_once() -> None:
    for (n, k), m in itertools.product(SHAPES, (1, 2, 8, 9, 16)):
        plan = _cuda_ring.plan(GPU, m, n, k, INT4)
        assert plan is not None, (n, k, m)
        tiles = -(-n // 32)
        blocks = min(tiles, active_clusters(GPU, plan.splits))
        rounds = -(-tiles // (blocks * plan.row_tiles))
        kept = rounds if plan.splits > 1 else 0
        assert _cuda_ring.shared_bytes(m, k, INT4, plan.splits, plan.row_tiles, kept) <= _cuda_ring.SHARED_BYTES
        assert plan.token_tiles == (2 if m > 8 else 1)
        assert blocks * plan.splits <= GPU.multiprocessors
        assert plan.splits == 1 or plan.row_tiles == 1


def test_x_of_any_length_is_divided_or_refused() -> None:
    assert _cuda_ring.plan(GPU, 1, 4096, 65536, INT4) is not None
    assert _cuda_ring.plan(GPU, 16, 4096, 8192, INT4).splits == 2  # type: ignore[union-attr]
    assert _cuda_ring.plan(GPU, 8, 8192, 28672, INT4) is not None
    assert _cuda_ring.plan(GPU, 16, 8192, 28672, INT4) is None


def test_clusters_are_no_more_than_run_at_once() -> None:
    assert [active_clusters(GPU, blocks) for blocks in (1, 2, 4, 8)] == [132, 66, 30, 15]
    assert active_clusters(Gpu((9, 0), 4), 8) == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (LinearCase("int4_linear", 32, 36), "needs rows of x and w that are multiples of 16 bytes, got 72 and 20"),
        (LinearCase("int8_linear", 32, 24), "needs rows of x and w that are multiples of 16 bytes, got 48 and 24"),
        (LinearCase("int4_linear", 3, 64, scale_dtype=BF16), "needs scales and zeros of whole words, got 6 bytes"),
        (LinearCase("int4_linear", 32, 64, group_size=20), "needs groups of a multiple of 32 columns or one per row"),
        (LinearCase("sparse24_linear", 16, 192, value_dtype=BF16), "needs K in multiples of 128 and N in multiples of"),
        (LinearCase("sparse24_linear", 20, 128, value_dtype=BF16), "needs K in multiples of 128 and N in multiples of"),
        (LinearCase("sparse24_linear", 16, 128, value_dtype=I8, scale_dtype=F32), "needs values in x's type or int4"),
        (
            LinearCase("sparse24_int4_linear", 32, 256, group_size=64, value_dtype=I8),
            "needs groups of a multiple of 128 columns or one per row, got group_size=64",
        ),
        (LinearCase("int4_linear", 32, 64, group_size=32, symmetric=False), None),
        (LinearCase("sparse24_int4_linear", 32, 256, group_size=128, value_dtype=I8), None),
    ],
    ids=lambda value: None if value is None else str(value)[:40],
)
def test_refusals(case: LinearCase, reason: str | None) -> None:
    module = importlib.import_module(f"llmkern.ops.{case.op}")
    x = torch.zeros((2, case.k), dtype=BF16)
    found = module.cuda_rejects("ring", *case.args(x, None))
    assert found == reason or (reason is not None and found is not None and found.startswith(reason))
