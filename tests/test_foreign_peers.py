"""Layers that compressed-tensors itself writes and reads: the same values as ours, exactly."""

import pytest
import torch

from llmkern.checkpoints import parse, read_layer

peer = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(layout, weights, activations, weight):
    """A layer's tensors by the package, and the dense weight that it reads from them."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=layout)
    args, group = scheme.weights, weights.get("group_size") or weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    if args.symmetric:
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(dict(state), scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_quantized(bits, symmetric, group, dtype, generator):
    weight = torch.randn(48, 160, generator=generator).to(dtype)
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
        "group_size": group, "dynamic": False,
    }  # fmt: skip
    stored, dense = compressed("pack-quantized", weights, None, weight)
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "format": "pack-quantized"}
    scheme = parse({"quant_method": "compressed-tensors", **config}).of("x")
    layer = read_layer(scheme, stored, (48, 160))
    # The package multiplies in the scale's dtype; ours is exact until it is rounded to that.
    assert torch.equal(layer.weight.unpack().to(dtype), dense)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized(symmetric, generator):
    weight = torch.randn(48, 96, generator=generator)
    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel", "dynamic": False}
    stored, dense = compressed("int-quantized", weights, DYNAMIC, weight)
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights, "input_activations": DYNAMIC}}}
    scheme = parse({"quant_method": "compressed-tensors", "format": "int-quantized", **config}).of("x")
    layer = read_layer(scheme, stored, (48, 96))
    assert torch.equal(layer.weight.unpack(), dense)
    assert scheme.activations == "int8"
