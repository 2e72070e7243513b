"""Grid: the scales and zero points that codes are chosen on, found before the column loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkern import ops
from llmkern.formats import _base
from llmkern.ops._linear import FLOATS, expand_groups

CLIPS = ("hessian", "mse", None)
# Clip ratios tried per group, from 1 down to 0.6: what gave the least perplexity on a real model.
STEPS, SMALLEST = 50, 0.6
# The largest share of itself by which rounding to its dtype may move a scale.
MOST_MOVED = 1 / 8


@dataclass(frozen=True, eq=False)
class Grid:
    """w = (code - zero) * scale per row and group of `group_size` natural columns.

    scales fp32 [N, G], representable in `scale_dtype`; zeros int8 [N, G] or None (symmetric); codes are signed `bits`.
    collapsed: bool [N, G], the groups whose scale `scale_dtype` could not hold (None: not known).
    """

    scales: Tensor
    zeros: Tensor | None
    group_size: int
    bits: int
    scale_dtype: torch.dtype = torch.float32
    collapsed: Tensor | None = None

    def groups(self, order: Tensor | None, k: int) -> Tensor:
        """int32 [K]: the group of the column at each place of `order`."""
        columns = torch.arange(k, device=self.scales.device) if order is None else order
        return (columns // self.group_size).to(torch.int32)

    def rows(self, at: slice | Tensor) -> Grid:
        """The grid of some of the rows."""
        zeros = None if self.zeros is None else self.zeros[at].contiguous()
        collapsed = None if self.collapsed is None else self.collapsed[at]
        return replace(self, scales=self.scales[at].contiguous(), zeros=zeros, collapsed=collapsed)

    def nearest(self, weight: Tensor) -> Tensor:
        """fp32 [N, K], natural order: every weight rounded to the nearest value of its group's grid."""
        k = weight.shape[1]
        values = _base.quantize(weight, self.scales, self.zeros, self.group_size, self.bits).float()
        if self.zeros is not None:
            values -= expand_groups(self.zeros.float(), self.group_size, k)
        return values.mul_(expand_groups(self.scales, self.group_size, k))


def find_grid(
    weight: Tensor, importance: Tensor | None, *, bits: int, group_size: int, symmetric: bool, clip: str | None,
    scale_dtype: torch.dtype = torch.float32,
) -> Grid:  # fmt: skip
    """The grid of fp32 weight [N, K]; scales are rounded to `scale_dtype` here, before any code is chosen on them.

    clip None: each group's whole range; "mse": the clipped range of least squared error; "hessian": the same with each
    column's error weighted by `importance` fp32 [K]: `Factor.costs` where columns make up for each other, else diag(H).
    """
    if scale_dtype not in FLOATS:
        raise TypeError(f"scale_dtype must be float32, bfloat16 or float16, got {scale_dtype}")
    if clip != "hessian" or importance is None:
        importance = weight.new_ones(weight.shape[1])
    steps = 1 if clip is None else STEPS
    scales, zeros = ops.scale_search(weight, importance.contiguous(), group_size, bits, symmetric, steps, SMALLEST)
    rounded = scales.to(scale_dtype).float()
    collapsed = (rounded - scales).abs() > MOST_MOVED * scales
    # A scale below scale_dtype's range would be 0; its group then rounds to zeros on any scale.
    scales = torch.where(rounded > 0, rounded, 1.0)
    return Grid(scales, None if symmetric else zeros, group_size, bits, scale_dtype, collapsed)
