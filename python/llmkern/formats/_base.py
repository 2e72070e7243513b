"""What every packed weight has; the helpers that pack and validate share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from llmkern.ops._linear import FLOATS, expand_groups, groups

PART = 1 << 19  # values of a part of `row_parts`
W = TypeVar("W", bound="PackedWeight")


class PackedWeight:
    """A weight [N, K] in one of the packed formats: a frozen dataclass of tensors, `shape`, and `group_size`.

    The tensors are in the canonical layout, contiguous, on one device. `group_size` counts dense columns of K; it is K
    for one group per row. The last group may be short.
    """

    ops: ClassVar[tuple[str, ...]] = ()  # the linear ops that take this weight, the one of `ops.linear` first
    shape: tuple[int, int]
    group_size: int

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, canonical layout; absent optional tensors are left out."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors().values())).device

    def to(self: W, device: torch.device | str) -> W:
        """The same weight on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})  # type: ignore[type-var]

    def op_args(self, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of this weight's op after x."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]."""
        raise NotImplementedError

    def _validate(self) -> None:
        """Raise ValueError unless every tensor's shape, dtype, and values are legal. Reads every value once."""
        raise NotImplementedError


def take(
    name: str, tensors: Mapping[str, Tensor], required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Tensor | None]:
    """The named tensors, contiguous; ValueError for a missing or an unknown one, or for mixed devices."""
    for key in required:
        if key not in tensors:
            raise ValueError(f"{name}: missing tensor {key!r}; got {', '.join(sorted(tensors)) or 'none'}")
    for key in tensors:
        if key not in required + optional:
            raise ValueError(f"{name}: unknown tensor {key!r}; known: {', '.join(required + optional)}")
    devices = {str(tensor.device) for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{name}: tensors are on different devices: {', '.join(sorted(devices))}")
    found = {key: tensors.get(key) for key in required + optional}
    return {key: None if tensor is None else tensor.contiguous() for key, tensor in found.items()}


def check_tensor(
    name: str, label: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    """ValueError unless the tensor has one of the dtypes and exactly this shape."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: {label} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {label} must be {list(shape)}, got {list(tensor.shape)}")


def are_scales(values: Tensor) -> bool:
    """Whether all are finite and above 0; a NaN is neither the one nor the other."""
    return not values.numel() or (float(values.min()) > 0 and float(values.max()) < math.inf)


def check_scale_values(name: str, scales: Tensor) -> None:
    """ValueError for a NaN, infinite, zero or negative scale."""
    if are_scales(scales):
        return
    row, group = (int(i) for i in (~(torch.isfinite(scales) & (scales > 0))).nonzero()[0])
    raise ValueError(
        f"{name}: scales must be finite and positive, got {float(scales[row, group])} at row {row}, group {group}"
    )


def check_finite(name: str, label: str, values: Tensor) -> None:
    """ValueError for a NaN or infinite value."""
    if not values.is_floating_point() or not values.numel():
        return
    # One pass: a NaN or infinity anywhere makes the sum one. A sum may also overflow, so then each value is looked at.
    total = values.sum(-1, dtype=None if values.dtype == torch.float64 else torch.float32).sum()
    if not math.isfinite(float(total)) and not torch.isfinite(values).all():
        raise ValueError(f"{name}: {label} hold a NaN or an infinity")


def check_weight(name: str, weight: Tensor) -> tuple[int, int]:
    """ValueError/TypeError unless weight is a finite float matrix; returns (N, K)."""
    if weight.ndim != 2:
        raise ValueError(f"{name}: weight must be [N, K], got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: weight must be a float tensor, got {weight.dtype}")
    check_finite(name, "weights", weight)
    return weight.shape[0], weight.shape[1]


def resolve_group_size(name: str, group_size: int | None, k: int) -> int:
    """None means one group per row; anything else must be an int in [1, K]."""
    if group_size is None:
        return max(k, 1)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or not 1 <= group_size <= max(k, 1):
        raise ValueError(f"{name}: group_size must be None or an int in [1, K={k}], got {group_size!r}")
    return group_size


def check_shape(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """ValueError unless shape is two non-negative ints."""
    if len(shape) != 2 or any(int(size) != size or size < 0 for size in shape):
        raise ValueError(f"{name}: shape must be (N, K), got {shape!r}")
    return int(shape[0]), int(shape[1])


def grid(
    weight: Tensor, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Round-to-nearest grid over each group's whole range: scales [N, G] in scale_dtype, zeros int8 [N, G] or None.

    symmetric: scale = 2 max|w| / (2^bits - 1); else scale = (max - min) / (2^bits - 1) over a range that holds 0 and
    zero = round(-min / scale) - 2^(bits - 1). A group of zeros gets scale 1.
    """
    if scale_dtype not in FLOATS:
        raise TypeError(f"scale_dtype must be float32, bfloat16 or float16, got {scale_dtype}")
    n, k = weight.shape
    grouped = torch.nn.functional.pad(weight.float(), (0, -k % group_size)).view(n, groups(k, group_size), group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    # By a tensor: a GPU multiplies by what a number's reciprocal rounds to, and codes would depend on the device.
    scales = ((high - low) / low.new_full((1,), 2**bits - 1)).to(scale_dtype)
    # A scale below the dtype's range (or a group of zeros) would be 0: such a group rounds to all zeros anyway.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    if symmetric:
        return scales, None
    zeros = torch.round(-low / scales.float()) - 2 ** (bits - 1)
    return scales, zeros.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


def quantize(weight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, bits: int) -> Tensor:
    """Nearest signed codes int8 [N, K] on a given grid."""
    n, k = weight.shape
    codes = weight.new_empty(n, k, dtype=torch.int8)
    for rows in row_parts(weight):
        values = weight[rows].float() / expand_groups(scales[rows].float(), group_size, k)
        values.round_()
        if zeros is not None:
            values += expand_groups(zeros[rows].float(), group_size, k)
        codes[rows] = values.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes


def row_parts(matrix: Tensor) -> list[slice]:
    """All rows of a matrix [N, K]; on a CPU in parts that stay in cache from one pass over them to the next."""
    n, k = matrix.shape
    if not matrix.numel():
        return []
    step = n if matrix.is_cuda else max(PART // k, 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
