"""Facts: python/sglang/srt/layers/linear.py, commit 0079fcc18b3e (2026)."""

from parallel_linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

__all__ = ["ColumnParallelLinear", "LinearBase", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear"]
