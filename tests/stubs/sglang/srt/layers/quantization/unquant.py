"""Facts: python/sglang/srt/layers/quantization/unquant.py, commit 0038b2b5e53c (2026)."""

import torch
from torch import nn

from sglang.srt.layers.quantization.base_config import LinearMethodBase


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
