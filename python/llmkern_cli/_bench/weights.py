"""One random matrix in every form that a candidate multiplies with.

Values and scales are representable in bf16, so that a candidate with bf16 (or wider) scales computes with exactly the
same weight as any other of its kind.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from llmkern import formats
from llmkern.formats import PackedWeight


def whole(group_size: int, k: int) -> int:
    """The group size for K columns: halved, down to 32, until it divides K, because few peers take a short last group.

    Where none does, it stays as it is.
    """
    smaller = group_size
    while k % smaller and smaller % 2 == 0 and smaller > 32:
        smaller //= 2
    return min(group_size, k) if k % smaller else smaller


class Weights:
    """A matrix [N, K]: dense, and packed in every format, on one device."""

    def __init__(self, n: int, k: int, group_size: int, device: str = "cpu"):
        self.shape, self.group_size, self.device = (n, k), whole(group_size, k), device
        random = torch.Generator(device).manual_seed(0)
        self.dense = torch.randn(n, k, generator=random, device=device).bfloat16().float()

    @cached_property
    def packed(self) -> dict[str, PackedWeight]:
        """By name: the weights of our ops."""
        weight, half = self.dense, torch.bfloat16
        n, k = self.shape
        quads = torch.nn.functional.pad(weight, (0, -k % 4)).view(n, -1, 4)
        sparse24 = (quads * (quads.abs().argsort(-1).argsort(-1) >= 2)).view(n, -1)[:, :k].contiguous()
        sparse = weight * (weight.abs() > weight.abs().median())
        g = self.group_size
        packed: dict[str, PackedWeight] = {
            "int8": formats.Int8Weight.pack(weight, scale_dtype=half),
            "int4": formats.Int4Weight.pack(weight, group_size=g, scale_dtype=half),
            "sparse24": formats.Sparse24Weight.pack(sparse24, dtype=half),
            "sparse24_int4": formats.Sparse24Int4Weight.pack(sparse24, group_size=g, scale_dtype=half),
            "bitmask": formats.BitmaskWeight.pack(sparse, dtype=half),
            "bitmask_int8": formats.BitmaskWeight.pack(sparse, dtype=torch.int8, scale_dtype=half),
        }
        return {name: one.to(self.device) for name, one in packed.items()}

    @cached_property
    def codes8(self) -> Tensor:
        """int8 [N, K]."""
        return self.packed["int8"].tensors()["codes"]

    @cached_property
    def scales8(self) -> Tensor:
        """fp32 [N]."""
        return self.packed["int8"].tensors()["scales"].flatten().float()

    @cached_property
    def codes4(self) -> Tensor:
        """int8 [N, K] in [-8, 7]."""
        return self.packed["int4"].codes()  # type: ignore[attr-defined]

    @cached_property
    def scales4(self) -> Tensor:
        """fp32 [N, G]."""
        return self.packed["int4"].tensors()["scales"].float()

    @property
    def sparse24(self) -> Tensor:
        """fp32 [N, K], two values of every four kept."""
        return self.exact("sparse24")

    @cached_property
    def _exact(self) -> dict[str, Tensor]:
        return {"dense": self.dense}

    def exact(self, name: str) -> Tensor:
        """fp32 [N, K]: what a weight of `packed` stands for, or "dense"; made once, for all who compare with it."""
        if name not in self._exact:
            self._exact[name] = self.packed[name].unpack()
        return self._exact[name]

    def rolled(self, number: int) -> Rolled:
        """The same matrix with its rows moved on by `number`: equal in bytes, but no two copies are alike."""
        return Rolled(self, number)


class Rolled:
    """What a peer builds copy `number` of its layer from; `dense`, `codes4` and so on are fresh tensors.

    source: the matrix before its rows moved.
    """

    def __init__(self, weights: Weights, number: int):
        self.shape, self.group_size = weights.shape, weights.group_size
        self.source, self._number = weights, number

    def __getattr__(self, name: str) -> Tensor:
        return getattr(self.source, name).roll(self._number, 0)
