"""From a recipe to the solver of one layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmkern.formats import Sparse24Weight
from llmkern.recipe import Recipe
from llmkern.solvers import Hessian, InputShift, Solution, corrected, gptq, magnitude, rtn, sparsegpt, wanda
from llmkern.solvers.grid import find_grid
from llmkern.solvers.output import OutputHessian
from llmkern.solvers.rtn import loss_without_factor
from llmkern.solvers.solution import pack_kept, pack_quantized


def solve(
    weight: Tensor, hessian: Hessian | None, recipe: Recipe, output: OutputHessian | None = None,
    shift: InputShift | None = None,
) -> Solution:  # fmt: skip
    """Solve one layer, weight [N, K] in the model's dtype, as `recipe` says; `packed` is always set.

    `hessian` may be None for data-free methods; `output` goes to gptq and sparsegpt, and so does the weight that makes
    up for `shift` as far as the recipe says. Raises ValueError (TypeError for dtypes) for what a solver refuses.
    """
    scale_dtype = getattr(torch, recipe.scale_dtype) if recipe.scale_dtype else weight.dtype
    dtype = weight.dtype
    if recipe.method == "pack":
        return _store(_as_it_is(weight), weight.dtype, recipe)
    if recipe.method == "rtn":
        return rtn(
            weight, hessian, bits=_bits(recipe), group_size=recipe.group_size, symmetric=recipe.symmetric,
            scale_dtype=scale_dtype,
        )  # fmt: skip
    if recipe.method == "magnitude":
        solution = magnitude(weight, hessian, sparsity=_sparsity(recipe))
        return (
            _round(weight, solution, hessian, recipe, scale_dtype)
            if recipe.bits
            else _store(solution, weight.dtype, recipe)
        )
    if hessian is None:
        raise ValueError(f"{recipe.method} needs calibration")
    if shift is not None and recipe.correction:
        weight = corrected(weight, hessian, shift, recipe.correction, recipe.damp)
    if recipe.method == "sparsegpt":
        solution = sparsegpt(
            weight, hessian, sparsity=_sparsity(recipe), bits=recipe.bits, group_size=recipe.group_size,
            refit=recipe.refit, damp=recipe.damp, scale_dtype=scale_dtype, output=output, descent=recipe.descent,
            scale_refit=recipe.scale_refit,
        )  # fmt: skip
        return solution if recipe.bits else _store(solution, dtype, recipe)
    mask = None
    if recipe.method == "wanda":
        solution = wanda(weight, hessian, sparsity=_sparsity(recipe))
        if not recipe.bits:
            return _store(solution, weight.dtype, recipe)
        mask = solution.mask
    return gptq(
        weight, hessian, bits=_bits(recipe), group_size=recipe.group_size, symmetric=recipe.symmetric,
        act_order=recipe.act_order, clip=recipe.clip, damp=recipe.damp, mask=mask, scale_dtype=scale_dtype,
        output=output, descent=recipe.descent, scale_refit=recipe.scale_refit,
    )  # fmt: skip


def _bits(recipe: Recipe) -> int:
    if recipe.bits is None:
        raise ValueError(f"{recipe.method} needs bits")
    return recipe.bits


def _sparsity(recipe: Recipe) -> float | str:
    if recipe.sparsity is None:
        raise ValueError(f"{recipe.method} needs a sparsity")
    return recipe.sparsity


def _store(solution: Solution, dtype: torch.dtype, recipe: Recipe) -> Solution:
    """The solution with its kept values in the recipe's dtype: by default the model's own 16 bits, else bfloat16.

    Solved in fp32 and rounded once, here.
    """
    if solution.mask is None:
        raise ValueError(f"{recipe.method} chose no mask")
    wanted = getattr(torch, recipe.dtype) if recipe.dtype else dtype if dtype.itemsize == 2 else torch.bfloat16
    packed = pack_kept(solution.weight, solution.mask, wanted)
    if recipe.method == "pack" and recipe.sparsity == "2:4" and not isinstance(packed, Sparse24Weight):
        raise ValueError("the weight is not 2:4: four columns hold more than two values that are not 0")
    return replace(solution, weight=packed.unpack(), packed=packed)


def _round(
    weight: Tensor, solution: Solution, hessian: Hessian | None, recipe: Recipe, scale_dtype: torch.dtype
) -> Solution:
    """A pruned solution with its kept values rounded to the nearest code."""
    group_size = recipe.group_size or weight.shape[1]
    grid = find_grid(
        solution.weight, None, bits=_bits(recipe), group_size=group_size, symmetric=True, clip=None,
        scale_dtype=scale_dtype,
    )  # fmt: skip
    packed, notes = pack_quantized(grid.nearest(solution.weight), grid, solution.mask)
    rounded = packed.unpack()
    loss, more = loss_without_factor(weight.float(), rounded, hessian)
    return replace(solution, weight=rounded, packed=packed, loss=loss, notes=(*notes, *more))


def _as_it_is(weight: Tensor) -> Solution:
    dense = weight.float()
    return Solution(dense, None, dense != 0, 0.0, 0.0, ())
