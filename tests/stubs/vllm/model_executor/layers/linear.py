"""Facts: vllm/model_executor/layers/linear.py, commit 0036d38de46c (2026)."""

from abc import abstractmethod

import torch
from parallel_linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from torch import nn

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

__all__ = [
    "ColumnParallelLinear",
    "LinearBase",
    "LinearMethodBase",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RowParallelLinear",
    "UnquantizedLinearMethod",
]


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ): ...  # fmt: skip

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ):  # fmt: skip
        weight = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight.input_dim, layer.weight.output_dim = 1, 0
        layer.weight.weight_loader = extra_weight_attrs["weight_loader"]

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)
