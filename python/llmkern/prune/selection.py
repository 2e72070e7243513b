"""Which input features of a layer can go: by weights, by weights and activations, or by what the others make good.

All three remove whole units (channels, heads, key-value groups) of features and differ in what a unit costs:

    magnitude   the squared norm of all weights that go with it
    wanda       Σ_j ‖W_:j‖² H_jj over its features j (Wanda's |W| ‖x‖, arXiv 2306.11695, summed over a column)
    obs         tr(W_g [(H⁻¹)_gg]⁻¹ W_gᵀ): the error that stays when the other features make up for it by least squares
                (the optimal brain surgeon for groups; ZipLM, arXiv 2302.04089)

H is the second moment of the layer's input, as SparseGPT's. obs is greedy: what was removed so far is taken out of W
and H⁻¹ before the next is chosen, in ROUNDS rounds at most, so that the work is in products of matrices.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmkern._dense import full_fp32, product
from llmkern.solvers import Hessian

METHODS = ("obs", "wanda", "magnitude")
# Of one choice of channels; costs are those of the start of a round.
ROUNDS = 32


class Costs(Protocol):
    """What the removal of a unit costs, given what is removed already."""

    def of_units(self, unit: int) -> Tensor:
        """[K / unit], any scale: the cost of each run of `unit` features; of one that is removed, anything."""

    def remove(self, features: Tensor) -> None:
        """Take these features, int64, out."""


class Fixed:
    """Costs that are sums over features, whatever is removed: energies [K]."""

    def __init__(self, energies: Tensor) -> None:
        self.energies = energies

    def of_units(self, unit: int) -> Tensor:
        """As in `Costs`."""
        return self.energies.view(-1, unit).sum(1)

    def remove(self, features: Tensor) -> None:
        """As in `Costs`."""


class Surgeon:
    """The costs of obs: W and H⁻¹ as they are once the remaining features have made up for the removed ones."""

    def __init__(self, weight: Tensor, hessian: Hessian, damp: float) -> None:
        """weight [N, K]; H gets damp * mean(diag H) on its diagonal."""
        # A feature that is 0 in every token costs nothing, whatever its weights.
        self.weight = weight.float().masked_fill(hessian.dead(), 0.0)
        factor = hessian.factor(None, damp)
        eye = torch.eye(hessian.k, device=hessian.device)
        with full_fp32():
            # H = V Vᵀ with V = unit diag(diagonal), so H⁻¹ = V⁻ᵀ V⁻¹.
            inverse = torch.linalg.solve_triangular(factor.unit, eye, upper=True, unitriangular=True)
            inverse /= factor.diagonal.unsqueeze(1)
            self.inverse = product(inverse.T.contiguous(), inverse)

    def of_units(self, unit: int) -> Tensor:
        """As in `Costs`."""
        units = len(self.inverse) // unit
        own = self.inverse.view(units, unit, units, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        columns = self.weight.T.reshape(units, unit, -1)  # W_gᵀ
        with full_fp32():
            return (torch.linalg.solve(own.double(), columns.double()) * columns).sum((1, 2))

    def remove(self, features: Tensor) -> None:
        """As in `Costs`."""
        rows = self.inverse[features]
        with full_fp32():
            share = torch.linalg.solve(rows[:, features].double(), rows.double()).float()
        self.weight -= product(self.weight[:, features].contiguous(), share)
        self.inverse -= product(rows.T.contiguous(), share)
        # Exactly gone: their columns are 0, and their own part is such that `of_units` can still divide by it.
        self.weight[:, features] = 0
        self.inverse[features] = 0
        self.inverse[:, features] = 0
        self.inverse[features, features] = 1


def costs(method: str, weight: Tensor, hessian: Hessian | None, written: Tensor, damp: float) -> Costs:
    """The costs of a layer's input features by one of METHODS.

    weight [N, K] of the reader; hessian of its input (None for magnitude, which takes none); written fp32 [K]: the
    squared norm of the writers' weights behind each feature, which only magnitude takes.
    """
    energies = weight.float().square().sum(0)
    if hessian is None:
        return Fixed(energies + written)
    return Fixed(energies * hessian.raw().diagonal()) if method == "wanda" else Surgeon(weight, hessian, damp)


def choose(costs: Costs, alive: list[int], unit: int, keep: int, per: int | None = None) -> list[int]:
    """The units of `alive` to keep, rising; the others are removed from `costs`.

    unit: features per unit. keep: how many units stay, of each run of `per` units (all of them if None), so that
    every key-value head keeps as many of its query heads. Equal costs: the unit that comes first goes first.
    """
    stays = set(alive)
    runs: dict[int, int] = {}
    for member in alive:
        runs[member // per if per else 0] = runs.get(member // per if per else 0, 0) + 1
    left = sum(runs.values()) - keep * len(runs)
    # One by one where a choice closes others: a run that has no more to give.
    step = 1 if per or unit > 1 else -(-left // ROUNDS)
    while left:
        order = costs.of_units(unit).argsort(stable=True).tolist()
        gone = [at for at in order if at in stays and runs[at // per if per else 0] > keep][: min(step, left)]
        for at in gone:
            stays.remove(at)
            runs[at // per if per else 0] -= 1
        left -= len(gone)
        features = torch.tensor(gone).unsqueeze(1) * unit + torch.arange(unit)
        costs.remove(features.view(-1))
    return sorted(stays)
