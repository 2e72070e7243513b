"""AWQ checkpoints in AutoAWQ's GEMM layout, 4 bits.

qweight  int32 [K, N / 8]   eight codes u along N in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros   int32 [G, N / 8]   zero points in the same order, as they are
scales   [G, N]             w = (u - z) * scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern.checkpoints import codes
from llmkern.checkpoints.scheme import (
    BadTensor,
    Layer,
    Part,
    Scheme,
    Schemes,
    check_parts,
    check_scales,
    choice,
    group_size,
    integer,
)
from llmkern.formats import Int4Weight
from llmkern.ops._linear import FLOATS

BITS = 4
WHERE = "quantization_config (awq)"
# Layouts of other kernels under the same name.
OTHERS = ("gemv", "gemv_fast", "llm-awq", "exllama", "ipex", "marlin")


class AwqSchemes(Schemes):
    """One scheme for all layers but those that were not to be converted."""

    method = "awq"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """ValueError for another layout than GEMM, and for settings that are not possible."""
        config = {**config}
        for ours, old in (("bits", "w_bit"), ("group_size", "q_group_size")):  # as AutoAWQ's own file names them
            if ours not in config and old in config:
                config[ours] = config[old]
        named = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        version = "llm-awq" if config.get("backend") == "llm-awq" else str(named).lower()
        if version in OTHERS:
            raise ValueError(f"{WHERE}: version {named!r} is the layout of another kernel; only gemm is read")
        if version != "gemm":
            raise ValueError(f"{WHERE}: version must be 'gemm', got {named!r:.80}")
        bits = integer(config, "bits", WHERE)
        if bits != BITS:
            raise ValueError(f"{WHERE}: bits must be 4, got {bits}")
        dense = config.get("modules_to_not_convert") or []
        if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
            raise ValueError(f"{WHERE}: modules_to_not_convert must be a list of names, got {dense!r:.80}")
        self.dense = tuple(dense)
        zero_point = choice(config, "zero_point", True, (True, False), WHERE)
        self.base = Scheme("awq", BITS, not zero_point, group_size(config, WHERE))
        super().__init__(("awq",))

    def of(self, name: str, kind: str = "Linear", also: tuple[str, ...] = ()) -> Scheme | None:
        """The scheme of a module; None where whole parts of its name are listed, and for the output head."""
        names = (name, *also)
        listed = any(f".{part}." in f".{known}." for part in self.dense for known in names)
        return None if listed or name.rpartition(".")[2] == "lm_head" else self.base


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a layer [N, K]."""
    (n, k), groups = shape, scheme.groups(shape[1])
    if n % 8:
        raise BadTensor("qweight", f"needs N to be a multiple of 8, got N={n}")
    return {
        "qweight": Part((torch.int32,), ((k, n // 8),)),
        "qzeros": Part((torch.int32,), ((groups, n // 8),), optional=scheme.symmetric),
        "scales": Part(FLOATS, ((groups, n),)),
    }


def read(scheme: Scheme, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Layer:
    """The packed layer, exact: the same codes, zero points, and scales in their own dtype."""
    _, k = shape
    check_parts(layout(scheme, shape), tensors)
    check_scales("scales", tensors["scales"])
    found = {"scales": tensors["scales"].T.contiguous()}
    if (qzeros := tensors.get("qzeros")) is not None and bool((zeros := codes.unpack_awq(qzeros)).any()):
        if scheme.symmetric:
            at = [int(i) for i in zeros.nonzero()[0]]
            got = int(zeros[tuple(at)]) + 8
            raise BadTensor("qzeros", f"must all be 8, since zero_point is false, got {got} at {at}")
        found["zeros"] = zeros.T.contiguous()
    words = tensors["qweight"]

    def rows_of(rows: slice) -> Tensor:
        return codes.unpack_awq(words[:, rows.start // 8 : rows.stop // 8]).T.contiguous()

    found |= codes.repack(rows_of, shape, BITS, None, words, multiple=8)
    return Layer(Int4Weight.from_tensors(found, shape=shape, group_size=min(scheme.group_size or k, k)), None)
