"""Something to time: one of our kernels or a peer, with what its row says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEPT, PER_GROUP, PER_ROW = "kept", "int8 per group", "int8 per row"
GIVEN = "int8 given"  # quantized before the clock starts, the result not scaled: the product alone
CLASSES = (KEPT, PER_GROUP, PER_ROW, GIVEN)  # what happens to the activations; only rows of one class are compared


@dataclass
class Candidate:
    """`build(number)` makes copy `number` of its layer; `bind(layer, x)` the call that multiplies x [M, K] by it.

    exact: the weight [N, K] it computes with; nbytes: what a call must read of it; multiplied: its values that take
    part, N * K unless it is sparse. finish(result, layer, x) makes the product of what a call returns, for the check
    alone. kernel_at(x) names the kernel that would run, where that depends on x. A candidate with a reason in
    `skipped` has nothing to call.
    """

    row: dict[str, Any]
    dtype: torch.dtype
    build: Callable[[int], Any] | None = None
    bind: Callable[[Any, Tensor], Callable[[], Any]] | None = None
    exact: Tensor | None = None
    nbytes: int = 0
    multiplied: int = 0
    most_copies: int = 1_000_000
    finish: Callable[[Any, Any, Tensor], Tensor] | None = None
    kernel_at: Callable[[Tensor], str] | None = None
    layers: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For messages and the plot."""
        row = self.row
        return f"{row['op']} {row['peer'] or row['kernel']} {row['dtype']} {row['activations']}"

    def skip(self, reason: str) -> None:
        """From now on it is a row with a reason."""
        self.row["skipped"] = " ".join(reason.split())
        self.layers = []


def row(
    *, op: str, shape: tuple[int, int], dtype: torch.dtype, kernel: str | None = None, peer: str | None = None,
    group_size: int | None = None, activations: str = KEPT, values: str,
) -> dict[str, Any]:  # fmt: skip
    """A row without its results. `values` is the type of the weight's values."""
    return {
        "op": op, "kernel": kernel, "peer": peer, "n": shape[0], "k": shape[1], "m": None, "group_size": group_size,
        "dtype": str(dtype).removeprefix("torch."), "activations": activations, "values": values,
        "threads": torch.get_num_threads(), "median_us": None, "spread": None, "rounds": None, "bytes": None,
        "operations": None, "limit_share": None, "bound": None, "ratio_to_dense": None, "error": None, "skipped": None,
        "copies": None, "rotated_bytes": None,
    }  # fmt: skip
