"""Hessian: the second moment of one input, shared by every layer that reads it, and its Cholesky factor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmkern import _large
from llmkern._dense import full_fp32, half_product, on_host, product, take_columns
from llmkern.solvers.problem import Problem

# Columns per product of `add` and of the factorization, which skip what is below the diagonal; 256 are wide enough for
# a GEMM to run at full speed on a CPU. On a GPU `add` takes four at a time.
BLOCK = 256
ROWS = 256  # of a product of the factorization: enough for its speed, and little of it is below the diagonal
MAX_DAMP = 1.0


@dataclass(frozen=True, eq=False)
class Factor:
    """H + added I = V Vᵀ with V upper triangular, rows and columns of H in `order`.

    unit fp32 [K, K] is V with every column divided by its diagonal entry (unit upper triangular), diagonal fp32 [K] is
    diag(V). `order` int64 [K] is the column of H at each place, None for the natural order. `damp` is the damping that
    was used, relative to the mean of diag(H); `notes` say when it is not the one asked for, and other surprises.
    """

    unit: Tensor
    diagonal: Tensor
    order: Tensor | None
    damp: float
    added: float
    notes: tuple[str, ...]

    def costs(self) -> Tensor:
        """fp32 [K], natural order: what an error of 1 in a column costs once all columns after it have made up for it.

        That is diag(V)², the energy of a feature that those after it do not explain: GPTQ's loss is the sum of these
        times its squared errors. diag(H) would count what the others make good.
        """
        costs = self.diagonal.square()
        return costs if self.order is None else torch.empty_like(costs).index_copy_(0, self.order, costs)


class Hessian:
    """Σ xxᵀ over the tokens of one input of K features, fp32.

    Layers that read the same input share one object, and with it the factorization: `factor` keeps its result until
    the next `add` or `merge`.
    """

    def __init__(self, k: int, device: torch.device | str | None = None) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"Hessian: K must be an int >= 1, got {k!r}")
        self.k = k
        self.tokens = 0
        self._sum = _large.zeros(k, device)
        self._whole = True  # False while blocks below the diagonal are out of date
        self._checked = True  # False while nobody has looked whether the sum is finite
        self._factors: dict[tuple[str | None, float], Factor] = {}
        self._spectra: dict[float, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def from_matrix(cls, matrix: Tensor, tokens: int = 1) -> Hessian:
        """A Hessian from a finished symmetric [K, K] matrix of any positive scale, the mean over `tokens` tokens."""
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ValueError(f"Hessian: the matrix must be [K, K], got {list(matrix.shape)}")
        if not matrix.is_floating_point():
            raise TypeError(f"Hessian: the matrix must be a float tensor, got {matrix.dtype}")
        if tokens < 1:
            raise ValueError(f"Hessian: tokens must be >= 1, got {tokens}")
        matrix = matrix.detach().float()
        if not torch.isfinite(matrix).all():
            raise ValueError("Hessian: the matrix holds a NaN or an infinity")
        if (matrix - matrix.T).abs().max() > 1e-4 * matrix.abs().max():
            raise ValueError("Hessian: the matrix is not symmetric")
        if (matrix.diagonal() < 0).any():
            raise ValueError("Hessian: the matrix has a negative diagonal entry, so it is no second moment")
        hessian = cls(len(matrix), matrix.device)
        hessian.tokens = tokens
        torch.mul(matrix, tokens, out=hessian._sum)
        return hessian

    @property
    def device(self) -> torch.device:
        """Where the sum is."""
        return self._sum.device

    def add(self, x: Tensor, *, rough: bool = False) -> Hessian:
        """Add the tokens of x [..., K], any float dtype. ValueError for another K, or a NaN or infinity in x.

        rough: three digits of what these tokens add will do, so a CPU may multiply in bf16 where that is faster. The
        sum is then no longer a second moment to the last digit: for Hessians whose damping is far above that.

        On a GPU, where looking at values waits for it, a NaN or infinity is found when the sum is first used.
        """
        if x.ndim == 0 or x.shape[-1] != self.k:
            raise ValueError(f"Hessian.add: x must be [..., K={self.k}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"Hessian.add: x must be a float tensor, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"Hessian.add: x is on {x.device}, but the Hessian is on {self.device}")
        rows = x.detach().reshape(-1, self.k)
        if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
            multiply = half_product
        else:
            rows, multiply = rows.float(), partial(product, rough=rough)
        width = BLOCK
        if on_host(rows):
            # A NaN or infinity anywhere shows in its column's energy, and so does a square beyond fp32.
            _refuse_unless_finite("Hessian.add: x has", rows.square().sum(0))
        else:
            width, self._checked = 4 * BLOCK, False
        columns = rows.T.contiguous()
        for start in range(0, self.k, width):
            at = slice(start, start + width)
            self._sum[at, start:] += multiply(columns[at], columns[start:].T)
        self.tokens += len(rows)
        self._changed()
        return self

    def merge(self, other: Hessian) -> Hessian:
        """Add the tokens that another Hessian of the same K has seen (on any device)."""
        if other.k != self.k:
            raise ValueError(f"Hessian.merge: K differs: {self.k} and {other.k}")
        self._sum += other._sum.to(self.device)
        self._checked = self._checked and other._checked
        self.tokens += other.tokens
        self._changed()
        return self

    def partial(self) -> Tensor:
        """A copy of the sum as it stands, fp32 [K, K], for adding up with those of other processes.

        What is below the diagonal may be out of date: see `from_partial`.
        """
        return self._sum.clone()

    @classmethod
    def from_partial(cls, total: Tensor, tokens: int) -> Hessian:
        """The Hessian of a sum of `partial`s, which is taken over, and of their tokens together."""
        hessian = cls(len(total), "meta")
        hessian._sum, hessian.tokens = total, tokens
        hessian._whole = hessian._checked = False
        return hessian

    def matrix(self) -> Tensor:
        """The mean of xxᵀ over tokens, fp32 [K, K]; a new tensor. ValueError without tokens."""
        return self.raw() / self.tokens

    def raw(self) -> Tensor:
        """The sum of xxᵀ over tokens, fp32 [K, K]: the state itself, not to be written to. ValueError without tokens.

        Solutions do not depend on the Hessian's scale, so solvers use this and save a copy.
        """
        if self.tokens == 0:
            raise ValueError("Hessian: zero calibration tokens")
        if not self._whole:
            for start in range(0, self.k, BLOCK):
                stop = start + BLOCK
                self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            self._whole = True
        if not self._checked:
            _refuse_unless_finite("Hessian: what was added has", self._sum.diagonal())
            self._checked = True
        return self._sum

    def dead(self) -> Tensor:
        """bool [K]: features that were 0 in every token."""
        return self.raw().diagonal() == 0

    def damped(self, damp: float) -> Tensor:
        """A copy of `raw` with damp * mean(diag) added to the diagonal, and 1 on the diagonal of dead features."""
        matrix = _large.empty(self.k, like=self.raw()).copy_(self.raw())
        matrix.diagonal().add_(damp * self.mean_diagonal()).masked_fill_(self.dead(), 1.0)
        return matrix

    def _damped_above(self, damp: float, order: Tensor | None) -> Tensor:
        """`damped` with rows and columns in this order, int64 [K] (None: as they are); below the diagonal, anything."""
        if order is None:
            return self.damped(damp)
        raw = self.raw()
        matrix = _large.empty(self.k, like=raw)
        for start in range(0, self.k, ROWS):
            rows = raw.index_select(0, order[start : start + ROWS])
            take_columns(rows, order[start:], matrix[start : start + ROWS, start:])
        matrix.diagonal().add_(damp * self.mean_diagonal()).masked_fill_(self.dead()[order], 1.0)
        return matrix

    def mean_diagonal(self) -> float:
        """Mean of diag(raw) over the features that are not dead; 0 if all are."""
        diagonal = self.raw().diagonal()
        return float(diagonal.double().sum() / (diagonal != 0).sum().clamp(min=1))

    def factor(self, order: str | None, damp: float) -> Factor:
        """The Cholesky factor in natural order (None) or in that of falling diag(H) ("activation").

        Tried in fp32, then in fp64, then with more damping, up to 1; the factor's `damp` and `notes` say what it took.
        ValueError if the matrix is not positive definite even then.
        """
        if (order, damp) not in self._factors:
            self._factors[order, damp] = self._factorize(order, damp)
        return self._factors[order, damp]

    def spectrum(self, damp: float) -> tuple[Tensor, Tensor, Tensor]:
        """(scale [K], energies [K], basis [K, K]): damped(damp) = S B diag(energies) Bᵀ S, S = diag(scale).

        S² is the diagonal, so the matrix in between has ones on its own. Kept until the next `add` or `merge`.
        """
        if damp not in self._spectra:
            damped = self.damped(damp)
            scale = damped.diagonal().sqrt()
            with full_fp32():
                energies, basis = torch.linalg.eigh(damped.div_(scale).div_(scale.unsqueeze(1)))
            self._spectra[damp] = (scale, energies.clamp_(min=0), basis)
        return self._spectra[damp]

    def _changed(self) -> None:
        self._whole = False
        self._factors.clear()
        self._spectra.clear()

    def _factorize(self, order: str | None, damp: float) -> Factor:
        places = None
        if order == "activation":
            places = self.raw().diagonal().argsort(descending=True, stable=True)
        notes: list[str] = []
        if count := int(self.dead().sum()):
            notes.append(Problem(f"{count} of {self.k} input features are 0 in every token: their weights become 0"))
        used, dtype = damp, torch.float32
        while (upper := _upper_factor(self._damped_above(used, places).to(dtype))) is None:
            if dtype == torch.float32:
                dtype = torch.float64
                continue
            used = max(2 * used, 1e-3)
            if used > MAX_DAMP:
                raise ValueError(
                    f"Hessian: not positive definite in fp64 even with damping up to {MAX_DAMP} of the mean diagonal"
                )
        if used != damp:
            notes.append(Problem(f"not positive definite in fp64 at damp {damp:g}: damp raised to {used:g}"))
        elif dtype == torch.float64:
            notes.append(Problem(f"not positive definite in fp32 at damp {damp:g}: factored in fp64"))
        diagonal = upper.diagonal().clone()
        return Factor(
            unit=upper.div_(diagonal).float(),
            diagonal=diagonal.float(),
            order=places,
            damp=used,
            added=used * self.mean_diagonal(),
            notes=tuple(notes),
        )


def _refuse_unless_finite(what: str, energies: Tensor) -> None:
    bad = ~torch.isfinite(energies)
    if bad.any():
        raise ValueError(f"{what} non-finite values (or squares) in feature {int(bad.nonzero()[0])}")


def _upper_factor(matrix: Tensor) -> Tensor | None:
    """V upper triangular with V Vᵀ = matrix, which it may overwrite; None if there is none.

    A pivot within rounding of zero counts as none: what it would divide is noise.
    """
    return _upper_by_blocks(matrix) if on_host(matrix) else _upper_at_once(matrix)


def _upper_at_once(matrix: Tensor) -> Tensor | None:
    """The Cholesky factor of the reversed matrix, reversed back. The one thing to wait for is whether there is one."""
    with full_fp32():
        lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    upper = lower.flip(0, 1)
    return None if bool((info != 0) | _near_zero(upper.diagonal(), matrix.diagonal())) else upper


def _near_zero(pivots: Tensor, diagonal: Tensor) -> Tensor:
    return (pivots.square() <= torch.finfo(pivots.dtype).eps * diagonal).any()


def _upper_by_blocks(matrix: Tensor) -> Tensor | None:
    """The same in place, from the last column to the first, with most of the work in oneDNN's products."""
    return matrix.triu_() if _upper_columns(matrix, matrix.diagonal().clone(), 0, len(matrix)) else None


def _upper_columns(matrix: Tensor, diagonal: Tensor, start: int, stop: int) -> bool:
    """Columns start to stop of V, in place of the matrix less what the columns of V behind `stop` make of it.

    The right half, then what it takes out of the left half, then the left half, so that most of the work is in few
    large products. `diagonal` is the whole matrix's. False if there is no factor. What is below the diagonal is not
    looked at, and left as anything.
    """
    if stop - start <= BLOCK:
        return _upper_block(matrix, diagonal, slice(start, stop))
    blocks = -(-(stop - start) // BLOCK)
    middle = start + (blocks + 1) // 2 * BLOCK
    if not _upper_columns(matrix, diagonal, middle, stop):
        return False
    right = matrix[start:middle, middle:stop].contiguous()
    for row in range(0, middle, ROWS):
        rows = slice(row, min(row + ROWS, middle))
        first = max(row, start)  # the columns before are below the diagonal
        matrix[rows, first:middle] -= product(matrix[rows, middle:stop], right[first - start :].T)
    return _upper_columns(matrix, diagonal, start, middle)


def _upper_block(matrix: Tensor, diagonal: Tensor, at: slice) -> bool:
    """A block of columns: the corner by LAPACK, whose L Lᵀ of the reversed corner is V Vᵀ, and what is above it."""
    corner = matrix[at, at]
    lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
    upper = lower.flip(0, 1)
    if int(info) or bool(_near_zero(upper.diagonal(), diagonal[at])):
        return False
    corner.copy_(upper)
    if at.start:
        # A solve with this many right-hand sides takes longer than the small inverse, and is no more accurate.
        eye = torch.eye(len(corner), dtype=matrix.dtype)
        inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
        matrix[: at.start, at] = product(matrix[: at.start, at], inverse.T)
    return True
