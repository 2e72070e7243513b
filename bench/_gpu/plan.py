"""What the sweep measures, most important first, as data."""

from __future__ import annotations

from typing import NamedTuple

from llmkern_cli._bench.shapes import SHAPES

Shape = tuple[int, int]

# N x K of the goals: 4096 * 14336 weights and more.
GOAL_SHAPES: tuple[Shape, ...] = ((14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
GOAL_MS = (1, 16, 64, 128, 1024, 4096)
MS = (1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 1024, 4096)
OTHER_SHAPES = tuple(
    shape
    for name in ("llama3-8b", "llama3-70b", "qwen3-moe")
    for shape in SHAPES[name]
    if shape not in GOAL_SHAPES
)  # fmt: skip
GROUP_SIZE = 128


class Cell(NamedTuple):
    """One shape and M. kernels: "best" is what runs unforced, beside the peers; "all" each of ours, forced."""

    n: int
    k: int
    m: int
    kernels: str


def _cells(shapes: tuple[Shape, ...], ms: tuple[int, ...], kernels: str = "best") -> list[Cell]:
    return [Cell(n, k, m, kernels) for n, k in shapes for m in ms]


FULL = (
    *_cells(GOAL_SHAPES, GOAL_MS),
    *_cells(GOAL_SHAPES, tuple(m for m in MS if m not in GOAL_MS)),
    *_cells(OTHER_SHAPES, MS),
    *_cells(GOAL_SHAPES[:3], MS, "all"),
    *_cells(OTHER_SHAPES[:1], MS, "all"),
)
# To tune by: what each kernel of ours takes where the goals are, then the peers.
TUNING = (*_cells(GOAL_SHAPES[:2], GOAL_MS, "all"), *_cells(GOAL_SHAPES[:1], GOAL_MS))
TINY = (*_cells(((64, 128), (32, 64)), (1, 8)), *_cells(((64, 128),), (8,), "all"))  # of a dry run
PLANS = {"full": FULL, "tuning": TUNING, "tiny": TINY}
EAGER_MS = (1, 16)  # where the time of a call from Python is taken as well
