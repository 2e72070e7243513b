"""Packed layers back to the dense modules that the model's own class has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import experts
from llmkern.nn import PackedLinear, dense_weight
from llmkern.patching import swap_all


def restore(model: Any, dtype: torch.dtype | None) -> None:
    """Replace every packed layer by a dense one of its values in `dtype` (None: the model's), in place."""
    dtype = dtype or model.dtype
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    for name, layer in packed.items():
        if layer.is_share:
            raise ValueError(f"dequantize: layer {name} holds one rank's share of its weight; load it on one rank")
    swap_all(model, {name: _linear(layer, dtype) for name, layer in packed.items()})
    experts.replace(model, {mixture: _fused(mixture, dtype) for mixture in experts.mixtures(model).values()})


def _linear(layer: PackedLinear, dtype: torch.dtype) -> nn.Module:
    weight, bias = layer.unpack(dtype), layer.bias
    if layer.conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense: Any = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    return dense.train(layer.training)


def _fused(mixture: experts.Experts, dtype: torch.dtype) -> nn.Module:
    """The mixture with 3-D parameters again."""
    fused = mixture.gating

    def stack(tensors: list[Tensor]) -> nn.Parameter:
        return nn.Parameter(torch.stack([tensor.detach().to(dtype) for tensor in tensors]))

    for name in mixture.projections(0):
        layers: list[Any] = [mixture.projections(at)[name] for at in range(mixture.num_experts)]
        weights = [dense_weight(layer) for layer in layers]
        fused.register_parameter(name, stack([w.T if mixture.transposed else w for w in weights]))
        if layers[0].bias is not None:
            fused.register_parameter(f"{name}_bias", stack([layer.bias for layer in layers]))
    return fused
