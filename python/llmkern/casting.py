"""cast: the whole model in another float dtype, which is no work of a layer at a time."""

from __future__ import annotations

import torch
from torch import nn

from llmkern import experts
from llmkern.nn import PackedLinear, dense_weight, is_linear
from llmkern.recipe import Recipe
from llmkern.report import Report, Row


def cast(model: nn.Module, recipe: Recipe, report: Report) -> None:
    """The whole model to another float dtype; a weight beyond its range is an error."""
    dtype = getattr(torch, str(recipe.dtype))
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("compress: the model holds packed layers already; a cast would not reach them")
    with experts.unfused(model):
        layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name, layer in layers.items():
        weight = dense_weight(layer)
        narrow = weight.to(dtype)
        if not torch.isfinite(narrow).all():
            raise ValueError(f"compress: layer {name}: a weight is not finite in {recipe.dtype}")
        error = (weight.float() - narrow.float()).square().sum() / weight.float().square().sum().clamp(min=1e-30)
        n, k = weight.shape
        report.rows.append(Row(name, (n, k), str(recipe), "torch", float(error), 0.0, weight.nbytes, narrow.nbytes))
    # What no file holds (rotary frequencies) stays as the model computes it, as when a checkpoint of that dtype loads.
    computed = [
        (module, key, module._buffers[key]) for module in model.modules() for key in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, key, buffer in computed:
        module._buffers[key] = buffer
