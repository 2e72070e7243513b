"""Which blocks a product in Triton uses: a function of the shape and the GPU alone, which tests read without one.

A program multiplies BLOCK_N rows of w with BLOCK_M rows of x, BLOCK_K columns at a time. The rows of w are the wide
side: few rows of x are padded to 16, the least that tensor cores take on every GPU, and w streams past them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float32", "half", "int8"]  # what is multiplied: fp32, bf16 or fp16, int8

PROCESSORS = {(8, 0): 108, (8, 9): 128, (9, 0): 132, (9, 4): 304, (10, 0): 148}  # of common GPUs
USUAL_PROCESSORS = 100
PER_PROCESSOR = 2  # programs that should be there for each, so that one computes while another waits for memory
LEAST_STEPS = 4  # of a program: fewer do not pay for filling the pipeline and for the second kernel
DECODING = 64  # what turning a step of w into a tile costs, in rows of x multiplied with it


@dataclass(frozen=True)
class Tiles:
    """The blocks of one product."""

    block_m: int
    block_n: int
    block_k: int
    per_group: int  # steps of a group of w's columns
    per_split: int  # steps of a program
    splits: int  # programs that share the columns of one tile of y
    warps: int
    stages: int
    whole: bool  # whether a step begins at a multiple of block_k, so that words are read once and not per column


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def block_m(m: int, largest: int) -> int:
    """Rows of x in a tile: of 16, 32, ... largest, what costs least where each tile decodes w anew."""
    sizes = [size for size in (16, 32, 64, 128) if size <= largest]
    return min(sizes, key=lambda size: (-(-m // size) * (size + DECODING), size))


def tiles(
    capability: tuple[int, int], m: int, n: int, k: int, group_size: int, kind: Kind, *, gathers: bool = False
) -> Tiles:
    """The blocks for x [m, k] and w [n, k] with groups of `group_size` columns; all at least 1.

    `gathers`: each value of w has an address of its own in registers. What the numbers respect is the registers of a
    thread: `tests/test_triton.py` compiles these blocks and sees that nothing spills.
    """
    one_group = group_size >= k
    if kind == "float32":  # no tensor cores: both operands of a step are registers of each thread
        rows, columns_of_y, wanted = block_m(m, 64), 64, 32
    else:
        rows = block_m(m, largest_block_m(capability, k, group_size, kind))
        columns_of_y, wanted = (64, 128) if rows <= 32 else (128, 128 if kind == "int8" else 64)
    if gathers:
        wanted = min(wanted, 64)
    block_k, whole = block_k_of(k, group_size, wanted, 32 if kind == "int8" else 16)
    per_group = -(-k // block_k) if one_group else -(-group_size // block_k)
    steps = per_group if one_group else -(-k // group_size) * per_group
    if whole and not one_group:
        steps = -(-k // block_k)  # the last group may be short
    programs = -(-m // rows) * -(-n // columns_of_y)
    wanted_splits = PROCESSORS.get(capability, USUAL_PROCESSORS) * PER_PROCESSOR // programs
    unit = 1 if one_group else per_group  # a group's integers are summed by one program
    per_split = max(-(-steps // max(wanted_splits, 1)), LEAST_STEPS)
    per_split = -(-per_split // unit) * unit
    splits = max(-(-steps // per_split), 1)
    warps = 8 if gathers or rows * columns_of_y >= 128 * 64 else 4
    # Column by column, a stage holds a word for each column: two of them fit into the shared memory of every GPU.
    stages = 2 if not whole else 4 if rows <= 32 else 3
    return Tiles(rows, columns_of_y, block_k, per_group, per_split, splits, warps, stages, whole)


def largest_block_m(capability: tuple[int, int], k: int, group_size: int, kind: Kind) -> int:
    """The most rows of x whose sums leave registers for the rest."""
    if k % 16:
        return 64  # columns are read one by one
    if group_size >= k:
        return 128
    # A group's sums stand beside the total: for wgmma alone, which reads x from shared memory, and if w is read whole.
    whole = block_k_of(k, group_size, 64, 16)[1]
    return 128 if kind == "half" and whole and capability[0] in (9, 10) else 64


def block_k_of(k: int, group_size: int, wanted: int, least: int) -> tuple[int, bool]:
    """(columns of a step, whether steps begin at multiples of it).

    A step never crosses a group, since the scale multiplies its sums. Groups of a multiple of `least` that is a power
    of two are cut evenly; others begin anywhere, and their last step is partly empty.
    """
    if group_size >= k:
        return max(least, min(wanted, power_of_two(k))), True
    even = group_size & -group_size
    if even >= least:
        return min(even, wanted), True
    return max(least, min(wanted, power_of_two(group_size))), False
