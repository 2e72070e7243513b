"""Linear layers of one rank, with loaders that do what vLLM's and SGLang's `weight_loader` are documented to do.

Facts from vllm/model_executor/layers/linear.py (2026) and python/sglang/srt/layers/linear.py: which arguments
`create_weights` gets for each kind of layer, that a loader is called with (parameter, tensor of the file[, shard id]),
that it narrows the tensor of the file along `output_dim` (column parallel) or `input_dim` (row parallel) by this rank's
size of the parameter, that the offsets of a fused layer's parts are divided by `packed_factor` where `packed_dim` is
`output_dim`, and that a parameter without these attributes is copied whole.
"""

import torch
from torch import nn

RANK, SIZE = 0, 1  # of the tensor-parallel group; tests set them


class LinearBase(nn.Module):
    def __init__(self, input_size, output_size, params_dtype, quant_config, prefix, unquantized):
        super().__init__()
        self.input_size, self.output_size, self.params_dtype, self.prefix = (
            input_size,
            output_size,
            params_dtype,
            prefix,
        )
        self.tp_rank, self.tp_size = RANK, SIZE
        self.quant_method = (
            unquantized() if quant_config is None else quant_config.get_quant_method(self, prefix=prefix)
        )
        assert self.quant_method is not None

    def _create(self, columns, rows, bias, bias_rows):
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=columns, output_partition_sizes=rows, input_size=self.input_size,
            output_size=self.output_size, params_dtype=self.params_dtype, weight_loader=self.weight_loader,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(bias_rows, dtype=self.params_dtype)) if bias else None
        if bias:
            self.bias.output_dim, self.bias.weight_loader = 0, self.weight_loader


def _copy(data, loaded):
    loaded = loaded.reshape(1) if loaded.ndim == 0 else loaded
    assert data.shape == loaded.shape, (tuple(data.shape), tuple(loaded.shape))
    data.copy_(loaded)


class ColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias, params_dtype, quant_config, prefix, unquantized, sizes=None):
        super().__init__(input_size, output_size, params_dtype, quant_config, prefix, unquantized)
        self.output_sizes = sizes or [output_size]
        rows = [size // SIZE for size in self.output_sizes]
        self._create(input_size, rows, bias, sum(rows))

    def weight_loader(self, param, loaded_weight):
        if (at := getattr(param, "output_dim", None)) is not None:
            size = param.shape[at]
            loaded_weight = loaded_weight.narrow(at, self.tp_rank * size, size)
        _copy(param.data, loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias), None


class MergedColumnParallelLinear(ColumnParallelLinear):
    """gate and up under one another; a shard id is a part's number, or None for a tensor that is fused in the file."""

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        at = getattr(param, "output_dim", None)
        if at is None:
            return _copy(param.data, loaded_weight)
        packed = param.packed_factor if getattr(param, "packed_dim", None) == at else 1
        if loaded_shard_id is None:
            start = 0
            for part, size in enumerate(self.output_sizes):
                size = size // packed
                self.weight_loader(param, loaded_weight.narrow(at, start, size), part)
                start += size
            return None
        start = sum(self.output_sizes[:loaded_shard_id]) // self.tp_size // packed
        size = self.output_sizes[loaded_shard_id] // self.tp_size // packed
        return _copy(param.data.narrow(at, start, size), loaded_weight.narrow(at, self.tp_rank * size, size))


class QKVParallelLinear(MergedColumnParallelLinear):
    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        part = (
            loaded_shard_id
            if loaded_shard_id is None
            else {"q": 0, "k": 1, "v": 2}.get(loaded_shard_id, loaded_shard_id)
        )
        return super().weight_loader(param, loaded_weight, part)


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias, params_dtype, quant_config, prefix, unquantized):
        super().__init__(input_size, output_size, params_dtype, quant_config, prefix, unquantized)
        self._create(input_size // SIZE, [output_size], bias, output_size)

    def weight_loader(self, param, loaded_weight):
        if (at := getattr(param, "input_dim", None)) is not None:
            size = param.shape[at]
            loaded_weight = loaded_weight.narrow(at, self.tp_rank * size, size)
        _copy(param.data, loaded_weight)

    def forward(self, x):
        """This rank's part of the sum; the bias is added on the first rank alone."""
        return self.quant_method.apply(self, x, self.bias if self.tp_rank == 0 else None), None
