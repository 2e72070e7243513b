"""The benchmarks themselves: what they time is right, and their rows are complete."""

import itertools

import pytest
import torch

from bench import linear, shapes, timing

LIMIT = {"read_gb_s": 10.0, "float32_gflop_s": 100.0, "bfloat16_gflop_s": 100.0}
KEYS = {
    "op", "kernel", "peer", "n", "k", "m", "group_size", "dtype", "activations", "threads", "median_us", "spread",
    "limit_share", "ratio_to_dense", "error", "skipped",
}  # fmt: skip


def test_shapes_by_name_and_by_size():
    assert shapes.parse("smollm2,576x576,3x4") == [(576, 576), (192, 576), (1536, 576), (576, 1536), (3, 4)]
    for text in ("nonsense", "3x", "3x4x5", ""):
        with pytest.raises(ValueError, match="wanted NxK or one of smollm2"):
            shapes.parse(text)


def test_every_candidate_is_timed_in_every_round():
    order = []
    found = timing.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0)
    assert set(found) == {"a", "b"}
    runs = [name for name, _ in itertools.groupby(order)]
    assert runs == ["a", "b"] * (len(runs) // 2)
    assert found["a"].rounds == timing.FEWEST_ROUNDS
    assert 0 < found["a"].least_us <= found["a"].median_us


def test_summary():
    found = timing.summary([1e-6, 2e-6, 3e-6, 4e-6, 100e-6])
    assert found.median_us == pytest.approx(3)
    assert found.least_us == pytest.approx(1)
    assert found.spread == pytest.approx(2 / 3)


def test_weights_rotate_when_they_must_come_from_memory():
    seen = []
    call = timing.rotating(seen.append, ["a", "b", "c"])
    for _ in range(4):
        call()
    assert seen == ["a", "b", "c", "a"]
    assert timing.copies_for(10_000_000, m=1) * 10_000_000 > timing.COLD_BYTES
    assert timing.copies_for(10_000_000, m=5) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_checked_timed_and_complete(dtype):
    packed = linear.weights(32, 128, 64)
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    candidates = list(linear.peers(packed["int8_linear"], packed["int4_linear"], x))
    for op, w in packed.items():
        candidates += linear.ours(op, w, x, ["reference"])
    rows = linear.measure(candidates, x, LIMIT, seconds=0)
    assert {row["op"] for row in rows} == {"linear", *packed}
    assert [row["peer"] for row in rows].count("torch.dense") == 1
    for row in rows:
        assert set(row) == KEYS
        assert (row["kernel"] is None) != (row["peer"] is None)
        assert row["skipped"] is None
        assert row["median_us"] > 0
        assert row["ratio_to_dense"] > 0
        assert 0 <= row["error"] < 0.03
        assert (row["limit_share"] is None) == (row["activations"] == "int8")
    assert len(linear.text(rows).splitlines()) == len(rows) + 1


def test_a_wrong_result_is_not_timed():
    x = torch.ones(8, 128)
    candidate = next(linear.peers(*(linear.weights(32, 128, 64)[op] for op in ("int8_linear", "int4_linear")), x))
    candidate.dense = candidate.dense * 1.01
    with pytest.raises(RuntimeError, match="wrong result, relative error 9"):
        linear.check(candidate, x)


def test_a_shape_that_a_peer_cannot_take_says_why():
    packed = linear.weights(24, 72, 64)
    x = torch.ones(8, 72, dtype=torch.bfloat16)
    skipped = [c.row["skipped"] for c in linear.peers(packed["int8_linear"], packed["int4_linear"], x)]
    assert skipped == [None, None, "needs K % 64 == 0 and N % 16 == 0"]
