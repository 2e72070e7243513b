"""What a recipe makes of a layer, in bytes, from its shape alone: the rules of `solve` and of the formats."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from llmkern.recipe import Recipe
from llmkern.solvers._checks import Pattern


class Size(NamedTuple):
    """format: the packed class ("dense" for a cast), None where the weights decide; nbytes: of its tensors.

    file_bytes: of its tensors in a compressed-tensors checkpoint, where sparse weights are stored with their zeros.
    """

    format: str | None
    nbytes: int | None
    file_bytes: int


def packed_size(shape: tuple[int, int], recipe: Recipe, dtype: torch.dtype) -> Size:
    """A layer [N, K] of weights of `dtype` after `recipe`: exactly what `compress` will report.

    The weights decide for the method "pack" (unless it is 2:4), and about fractions so high that a mask may happen to
    be 2:4 (nbytes is then that of the other format).
    """
    n, k = shape
    item = (getattr(torch, recipe.dtype) if recipe.dtype else dtype if dtype.itemsize == 2 else torch.bfloat16).itemsize
    if recipe.method == "cast":
        return Size("dense", n * k * item, n * k * item)
    scale = (getattr(torch, recipe.scale_dtype) if recipe.scale_dtype else dtype).itemsize
    group = min(recipe.group_size or k, k)
    groups = n * math.ceil(k / group)
    stored = 4 if (recipe.bits or 0) <= 4 else 8
    dense_codes = n * math.ceil(k / 8) * 4 if stored == 4 else n * k
    grid = groups * scale
    bits = recipe.bits or stored
    in_file = n * math.ceil(k * bits / 32) * 4 + grid + 16
    if recipe.sparsity is None and recipe.bits:
        zeros = 0 if recipe.symmetric else groups
        zeros_in_file = 0 if recipe.symmetric else math.ceil(n * bits / 32) * 4 * (groups // n)
        name = "Int4Weight" if stored == 4 else "Int8Weight"
        return Size(name, dense_codes + grid + zeros, in_file + zeros_in_file)
    if recipe.sparsity is None:
        return Size(None, None, n * k * item)
    pattern = Pattern.parse("plan", recipe.sparsity)
    quads = math.ceil(k / 4)
    positions = n * math.ceil(quads / 2)
    two_of_four = always_24(pattern)
    if not recipe.bits:
        if two_of_four:
            return Size("Sparse24Weight", n * 2 * quads * item + positions, n * k * item)
        if recipe.method == "pack":
            return Size(None, None, n * k * item)
        return Size("BitmaskWeight", kept(shape, recipe, pattern) * item + _bitmask(n, k), n * k * item)
    if two_of_four and (group % 4 == 0 or group >= k):
        if stored == 4:
            words = n * math.ceil(2 * quads / 8) * 4
            return Size("Sparse24Int4Weight", words + positions + grid, in_file)
        return Size("Sparse24Weight", n * 2 * quads + positions + grid, in_file)
    if stored == 8:
        return Size("BitmaskWeight", kept(shape, recipe, pattern) + _bitmask(n, k) + grid, in_file)
    return Size("Int4Weight", dense_codes + grid, in_file)


def always_24(pattern: Pattern) -> bool:
    """Whether no mask of this n:m pattern can keep more than two of four columns from a multiple of 4."""
    if not pattern.m:
        return False
    most = 0
    for quad in range(math.lcm(4, pattern.m) // 4):
        inside = [column // pattern.m for column in range(4 * quad, 4 * quad + 4)]
        most = max(most, sum(min(pattern.m - pattern.n, inside.count(group)) for group in set(inside)))
    return most <= 2


def kept(shape: tuple[int, int], recipe: Recipe, pattern: Pattern) -> int:
    """How many weights the mask of `recipe` keeps."""
    n, k = shape
    if pattern.m:
        tail = k % pattern.m
        return n * (k // pattern.m * (pattern.m - pattern.n) + tail - pattern.of_tail(tail))
    if recipe.method == "wanda":
        return n * (k - round(pattern.fraction * k))
    # The products are rounded as the solvers round them.
    pruned = round(pattern.fraction * n * k) if recipe.method == "sparsegpt" else round(pattern.fraction * (n * k))
    return n * k - pruned


def _bitmask(n: int, k: int) -> int:
    return n * math.ceil(k / 8) + (n + 1) * 8
