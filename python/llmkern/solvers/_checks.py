"""Checks and small types that every solver shares. Errors are one line: solver, argument, wanted, got."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern._dense import on_host
from llmkern.formats import _base
from llmkern.ops.sparsegpt_block import MAX_M
from llmkern.solvers.hessian import Hessian


@dataclass(frozen=True)
class Pattern:
    """Which weights to prune: a fraction of them all (`m == 0`), or `n` of every `m` consecutive columns."""

    fraction: float
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, name: str, sparsity: float | str) -> Pattern:
        """A fraction in [0, 1), or "n:m" = n zeros in every m columns, as in the SparseGPT paper (2:4 is 2 of 4)."""
        if isinstance(sparsity, str):
            parts = sparsity.split(":")
            if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
                raise ValueError(f'{name}: sparsity must be a number in [0, 1) or "n:m", got {sparsity!r}')
            n, m = int(parts[0]), int(parts[1])
            if not 0 < n < m <= MAX_M:
                raise ValueError(f"{name}: n:m needs 0 < n < m <= {MAX_M}, got {sparsity!r}")
            return cls(n / m, n, m)
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise ValueError(f'{name}: sparsity must be a number in [0, 1) or "n:m", got {sparsity!r}')
        return cls(float(sparsity))

    def of_tail(self, columns: int) -> int:
        """How many of the last `columns` < m to prune so that they keep no more than a whole group would."""
        return max(0, columns - (self.m - self.n))


def as_matrix(name: str, weight: Tensor) -> Tensor:
    """The weight [N, K] as fp32, contiguous, detached; not a copy where it already is that. Raises if not finite."""
    _base.check_weight(name, weight)
    return weight.detach().to(torch.float32).contiguous()


def as_hessian(name: str, hessian: Hessian | Tensor, weight: Tensor) -> Hessian:
    """A Hessian that fits weight [N, K]; ValueError for another K or device, or one without tokens."""
    k = weight.shape[1]
    if not isinstance(hessian, Hessian):
        if not isinstance(hessian, Tensor):
            raise TypeError(f"{name}: hessian must be a Hessian or a [K, K] tensor, got {type(hessian).__name__}")
        hessian = Hessian.from_matrix(hessian)
    if hessian.k != k:
        raise ValueError(f"{name}: weight is [N, K]={list(weight.shape)}, but the Hessian is of K={hessian.k}")
    if hessian.device != weight.device:
        raise ValueError(f"{name}: weight is on {weight.device}, but the Hessian is on {hessian.device}")
    if hessian.tokens == 0:
        raise ValueError(f"{name}: the Hessian has seen zero calibration tokens")
    return hessian


def check_bits(name: str, bits: int) -> None:
    """ValueError unless bits is an int in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{name}: bits must be an int in 2..8, got {bits!r}")


def check_damp(name: str, damp: float) -> None:
    """ValueError unless damp is a finite number >= 0."""
    if isinstance(damp, bool) or not isinstance(damp, (int, float)) or not math.isfinite(damp) or damp < 0:
        raise ValueError(f"{name}: damp must be a finite number >= 0, got {damp!r}")


def count_or(name: str, argument: str, count: int | None, default: int) -> int:
    """A number of passes or steps, or what it is by default (None); ValueError unless it is an int >= 0."""
    if count is None:
        return default
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{name}: {argument} must be an int >= 0, got {count!r}")
    return count


def live(weight: Tensor, hessian: Hessian) -> Tensor:
    """weight [N, K] with 0 in the columns of dead features; the weight itself if there are none."""
    dead = hessian.dead()
    return weight if on_host(dead) and not dead.any() else weight.masked_fill(dead, 0)


def check_choice(name: str, argument: str, value: object, choices: tuple) -> None:
    """ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_keep_mask(name: str, mask: Tensor | None, weight: Tensor) -> Tensor | None:
    """A contiguous bool mask of weight's shape and device (True = kept), or None."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool (True = kept), got {mask.dtype}")
    if mask.shape != weight.shape or mask.device != weight.device:
        raise ValueError(
            f"{name}: mask must be {list(weight.shape)} on {weight.device}, got {list(mask.shape)} on {mask.device}"
        )
    return mask.contiguous()
