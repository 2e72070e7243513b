"""humming-kernels: int4 and int8 weights with activations kept or int8 per row, compiled when first called.

It reads the words of compressed-tensors, which are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern.formats.int4 import pack_words
from llmkern_cli._bench.candidate import KEPT, PER_ROW
from llmkern_cli._bench.peers import Peer, whole_groups
from llmkern_cli._bench.weights import Rolled


def _build(weights: Rolled, dtype: torch.dtype, bits: int, activations: str) -> Any:
    from humming.layer import HummingLayer

    n, k = weights.shape
    grouped = bits == 4
    kind = {"strategy": "group", "group_size": weights.group_size} if grouped else {"strategy": "channel"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "num_bits": bits, **kind}
    layer = HummingLayer(
        shape_n=n, shape_k=k, weight_config=config, torch_dtype=dtype,
        input_config=None if activations == KEPT else {"dtype": "int8"},
    ).to(weights.source.device)  # fmt: skip
    if grouped:
        words, scales = pack_words(weights.codes4), weights.scales4
    else:
        words = (weights.codes8.view(torch.uint8) ^ 128).view(torch.int32)  # u = q + 128, four to a word
        scales = weights.scales8[:, None]
    layer.load_from_tensors({"weight_packed": words, "weight_scale": scales.to(dtype)})
    layer.transform()
    return layer


def _bind(layer: Any, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _peer(bits: int, op: str, activations: str = KEPT) -> Peer:
    return Peer(
        f"humming.int{bits}.{'kept' if activations == KEPT else 'int8'}", op,
        functools.partial(_build, bits=bits, activations=activations), _bind, activations,
        (torch.bfloat16, torch.float16), ("humming",), whole_groups, devices=("cuda",),
    )  # fmt: skip


PEERS = (
    _peer(4, "int4_linear"),
    _peer(4, "int4_linear", PER_ROW),
    _peer(8, "int8_linear"),
    _peer(8, "int8_dynamic_linear", PER_ROW),
)
