"""magnitude_: prune a model's weights of least absolute value, in place, and say which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from llmkern.prune.bits import Bits
from llmkern.prune.masks import MaskSet
from llmkern.prune.matrices import Matrix, find
from llmkern.recipe import DEFAULT_IGNORE
from llmkern.solvers._checks import Pattern, as_matrix, check_choice
from llmkern.solvers.magnitude import keep_by_score

NAME = "magnitude_"
HIGH = 16  # of a rank's 31 bits those that the first of two counts goes by are above this one
# A matrix and what is pruned of it already (bool [N, K]) -> what to keep, bool [N, K].
Choose = Callable[[Matrix, Tensor], Tensor]


@torch.no_grad()
def magnitude_(
    model: nn.Module, sparsity: float | str, *, scope: str = "layer", targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = DEFAULT_IGNORE, masks: MaskSet | None = None,
) -> MaskSet:  # fmt: skip
    """Set the weights of least |w| of the linear layers (nn.Linear, Conv1D, experts) to 0; returns the masks.

    sparsity: the share that is 0 afterwards, in [0, 1), or "n:m": n of every m columns of each row. scope: "layer"
    takes exactly that share of each layer (an expert is a layer), "global" of all weights together, by one threshold.
    Of equal weights the first go, in the order of the layers. targets, ignore: as in Recipe. What is left out is in
    the result's `skipped`, with the reason.

    masks: those of an earlier call. Their zeros stay and count as part of the share, so that no weight comes back; the
    result has them all, and takes their place in the optimizers to which they are attached.

    Raises ValueError, TypeError before anything is changed: a sparsity that is none, n:m with scope="global", weights
    that are not finite, a layer of which nothing would be left, masks that do not fit, a weight that is tied to another
    module's, and what `find` refuses.
    """
    pattern = Pattern.parse(NAME, sparsity)
    check_choice(NAME, "scope", scope, ("layer", "global"))
    if pattern.m and scope == "global":
        raise ValueError(f'{NAME}: {sparsity} is a share of every {pattern.m} columns, so scope must be "layer"')
    if masks is not None and masks.model is not model:
        masks = MaskSet(model, masks.bits)  # refuses those that do not fit
    found, skipped = find(NAME, model, targets, ignore)
    choose = partial(_by_layer, pattern) if scope == "layer" else _globally(found, pattern.fraction, masks)
    bits = {} if masks is None else dict(masks.bits)
    for name, matrices in found.items():
        keep = bits[name].unpack() if name in bits else _all(model.get_parameter(name))
        for matrix in matrices:
            own = matrix.of(keep)
            own &= choose(matrix, ~own)
            if not own.any():
                raise ValueError(f"{NAME}: nothing would be left of layer {matrix.layer}: prune less, or ignore it")
        bits[name] = Bits.pack(keep, matrices[0].transposed)
    result = MaskSet(model, bits, skipped)
    result.apply()
    if masks is not None:
        result.replace(masks)
    return result


def _all(parameter: Tensor) -> Tensor:
    return torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)


def _fp32(matrix: Matrix) -> Tensor:
    """|w| [N, K]. Errors name the layer."""
    try:
        return as_matrix(NAME, matrix.weight).abs()
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error} (layer {matrix.layer})") from None


def _by_layer(pattern: Pattern, matrix: Matrix, pruned: Tensor) -> Tensor:
    return keep_by_score(_fp32(matrix).masked_fill_(pruned, -1), pattern)


def _globally(found: dict[str, list[Matrix]], fraction: float, masks: MaskSet | None) -> Choose:
    """A choice by one threshold, the same for all matrices, of which as many go as are asked for.

    Two counts over all ranks find it, one layer in memory at a time: by their upper bits, then, of those that share the
    threshold's upper bits, by the lower ones.
    """

    def ranks() -> Iterator[Tensor]:
        for name, matrices in found.items():
            keep = masks.bits[name].unpack() if masks is not None and name in masks.bits else None
            for matrix in matrices:
                yield _ranks(matrix, None if keep is None else ~matrix.of(keep)).flatten()

    count = round(fraction * sum(matrix.weight.numel() for matrices in found.values() for matrix in matrices))
    upper, left = _bin(((rank >> HIGH) for rank in ranks()), 1 << (31 - HIGH), count)
    lower = (rank[rank >> HIGH == upper] & ((1 << HIGH) - 1) for rank in ranks())
    low, ties = _bin(lower, 1 << HIGH, left)
    threshold = (upper << HIGH) + low

    def choose(matrix: Matrix, pruned: Tensor) -> Tensor:
        nonlocal ties
        rank = _ranks(matrix, pruned)
        keep = rank > threshold
        equal = (rank == threshold).flatten().nonzero().flatten()
        keep.view(-1)[equal[ties:]] = True
        ties -= min(ties, len(equal))
        return keep

    return choose


def _ranks(matrix: Matrix, pruned: Tensor | None) -> Tensor:
    """int32 [N, K] in the order of |w|: the bits of a float >= 0, as a number, plus 1; 0 for what is pruned already."""
    ranks = _fp32(matrix).view(torch.int32) + 1
    return ranks if pruned is None else ranks.masked_fill_(pruned, 0)


def _bin(parts: Iterator[Tensor], bins: int, count: int) -> tuple[int, int]:
    """The bin with the `count`-th least of all numbers, and how many of `count` are in it."""
    total = torch.zeros(bins, dtype=torch.int64)
    for part in parts:
        total += part.bincount(minlength=bins).cpu()
    upto = total.cumsum(0)
    at = int(torch.searchsorted(upto, count))
    return at, count - int(upto[at] - total[at])
