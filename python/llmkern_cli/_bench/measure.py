"""From candidates to rows: build, check, time all of them interleaved, and relate to the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench import timing
from llmkern_cli._bench.candidate import KEPT, Candidate

# Relative error (Frobenius norm) at which a result is wrong rather than rounded.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INT8_TOLERANCE = 3e-2
KEPT_BELOW = 1e-4  # no rounding of random activations to int8 is as exact
CHECKED_ROWS = 512  # of the weight: enough to see any wrong block, and 64-bit products stay cheap


def input_rows(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random x [M, K]."""
    return torch.randn(m, k, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


def as_tensor(result: Any) -> Tensor:
    """A peer's result, a tensor or anything that numpy takes, as fp64."""
    return (result if isinstance(result, Tensor) else torch.as_tensor(result)).double()


def check(candidate: Candidate, call: Callable[[], Any], x: Tensor) -> float:
    """The relative error against the exact product; raises RuntimeError when it is more than rounding."""
    assert candidate.exact is not None
    n = len(candidate.exact)
    at = torch.linspace(0, n - 1, min(n, CHECKED_ROWS)).long()
    exact = x.double() @ candidate.exact[at].double().T
    result = call()
    if candidate.finish is not None:
        result = candidate.finish(result, candidate.layers[0], x)
    got = as_tensor(result).reshape(len(x), n)
    error = float((got[:, at] - exact).norm() / exact.norm())
    allowed = TOLERANCE[candidate.dtype] if candidate.row["activations"] == KEPT else INT8_TOLERANCE
    if not error <= allowed or not bool(got.isfinite().all()):
        raise RuntimeError(f"wrong result: relative error {error:.2e}, allowed {allowed:.0e}")
    if candidate.row["activations"] != KEPT and error < KEPT_BELOW and bool(exact.any()):
        raise RuntimeError(f"of another class: relative error {error:.2e}, so the activations were not quantized")
    return error


@torch.inference_mode()
def measure(
    candidates: Sequence[Candidate], ms: Sequence[int], limits: dict[str, Any], seconds: float,
    told: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every candidate at every M, of one shape. What cannot be built or is wrong is a row with its reason."""
    rows = []
    for m in ms:
        rows += _measure_at(candidates, m, limits, seconds)
        told(f"M={m}")
    return rows


def _measure_at(
    candidates: Sequence[Candidate], m: int, limits: dict[str, Any], seconds: float
) -> list[dict[str, Any]]:
    rows = [{**candidate.row, "m": m} for candidate in candidates]
    calls: dict[str, list[Callable[[], Any]]] = {}
    bursts: dict[str, timing.Burst] = {}

    def attempt(at: int, step: Callable[[int], None]) -> None:
        """A peer may fail in any way; that is its row."""
        try:
            step(at)
        except Exception as error:
            rows[at]["skipped"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            calls.pop(str(at), None)
            bursts.pop(str(at), None)

    def first(at: int) -> None:
        candidate = candidates[at]
        assert candidate.bind is not None
        _grow(candidate, 1)
        x = input_rows(m, candidate.row["k"], candidate.dtype)
        if candidate.kernel_at is not None:
            rows[at]["kernel"] = candidate.kernel_at(x)
        call = candidate.bind(candidate.layers[0], x)
        rows[at]["error"] = check(candidate, call, x)
        bursts[str(at)], calls[str(at)] = timing.burst(call), [call]

    def copies(at: int) -> None:
        """As many as keep its weight out of the caches, and their calls."""
        candidate = candidates[at]
        assert candidate.bind is not None
        wanted = min(rounds * bursts[str(at)].calls, candidate.most_copies)
        _grow(candidate, wanted)
        x = input_rows(m, candidate.row["k"], candidate.dtype)
        calls[str(at)] += [candidate.bind(layer, x) for layer in candidate.layers[1:wanted]]

    for at, candidate in enumerate(candidates):
        if not candidate.row["skipped"]:
            attempt(at, first)
    rounds = timing.cold_rounds(sum(candidates[int(at)].nbytes * burst.calls for at, burst in bursts.items()))
    for at in [int(name) for name in bursts]:
        attempt(at, copies)
    timings = timing.interleaved(calls, bursts, seconds=seconds) if calls else {}
    per_round = sum(candidates[int(at)].nbytes * burst.calls for at, burst in bursts.items())
    dense = {
        rows[int(at)]["dtype"]: found.median_us
        for at, found in timings.items()
        if rows[int(at)]["peer"] == "torch.dense"
    }
    for name, found in timings.items():
        row, candidate = rows[int(name)], candidates[int(name)]
        used = len(calls[name])
        row.update(
            median_us=round(found.median_us, 2), spread=round(found.spread, 3), rounds=found.rounds, copies=used,
            rotated_bytes=int(per_round * used / bursts[name].calls), bytes=candidate.nbytes,
            operations=2 * m * candidate.multiplied, **limit_share(candidate, m, limits, found.median_us),
        )  # fmt: skip
        if row["dtype"] in dense:
            row["ratio_to_dense"] = round(found.median_us / dense[row["dtype"]], 3)
    return rows


def _grow(candidate: Candidate, copies: int) -> None:
    """Build as many layers, if it has fewer."""
    assert candidate.build is not None
    candidate.layers += [candidate.build(number) for number in range(len(candidate.layers), copies)]


def limit_share(candidate: Candidate, m: int, limits: dict[str, Any], median_us: float) -> dict[str, Any]:
    """The least possible time over the median: its bytes at the read bandwidth, or its operations at the peak."""
    factors = "float32" if candidate.dtype == torch.float32 else "bfloat16"
    peak = limits["int8_gop_s" if candidate.row["activations"] != KEPT else f"{factors}_gop_s"]
    if not peak or not limits["read_gb_s"]:
        return {}
    reading = candidate.nbytes / limits["read_gb_s"] / 1e3
    computing = 2 * m * candidate.multiplied / peak / 1e3
    bound = "read" if reading >= computing else "compute"
    return {"limit_share": round(max(reading, computing) / median_us, 3), "bound": bound}
