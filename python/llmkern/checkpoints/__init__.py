"""Readers of checkpoints that others wrote, straight into packed weights: codes, zero points and scales as they are.

    compressed-tensors   pack-quantized (2 to 8 bits), int-quantized, marlin-24, sparse-24-bitmask, sparse-bitmask
    GPTQ                 v1 and v2, 2, 3, 4 and 8 bits, also with columns in the order of their activations
    AWQ                  GEMM, 4 bits

`read_layer` takes the tensors of one layer and is all that knows the bytes; `read_model` builds a model of a folder
around it, and `describe` tells what is in one from its headers. Files are not trusted: whatever is missing, unknown, of
another shape or out of range is an error that names the file, the tensor, what was wanted and what came.
"""

from __future__ import annotations

from llmkern.checkpoints.folder import Description, LayerInfo, describe
from llmkern.checkpoints.layers import FORMATS, METHODS, layout, parse, read_layer, stack
from llmkern.checkpoints.model import read_model
from llmkern.checkpoints.scheme import BadTensor, Layer, Part, Scheme, Schemes

__all__ = [
    "FORMATS",
    "METHODS",
    "BadTensor",
    "Description",
    "Layer",
    "LayerInfo",
    "Part",
    "Scheme",
    "Schemes",
    "describe",
    "layout",
    "parse",
    "read_layer",
    "read_model",
    "stack",
]
