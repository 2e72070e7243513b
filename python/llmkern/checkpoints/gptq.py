"""GPTQ checkpoints (AutoGPTQ's v1 and GPTQModel's v2 layout), 2, 3, 4 and 8 bits.

    qweight  int32 [K * bits / 32, N]   codes u of a column of words along K, dense, least significant first
    qzeros   int32 [G, N * bits / 32]   zero points along N: v2 stores z, v1 stores z - 1
    scales   [G, N]                     w = (u - z) * scale
    g_idx    int32 [K]                  the group of each column

v1 has no room for z = 0: its field is all ones. AutoGPTQ subtracts in each field, GPTQModel from the whole word, where
0 borrows from the next field; adding the same word gives the zero points back exactly. `meta.quantizer` tells which
wrote the file. Elsewhere both rules are one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor

from llmkern.checkpoints import codes
from llmkern.checkpoints.scheme import (
    INTEGERS,
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
from llmkern.checkpoints.targets import check_pattern
from llmkern.formats import Int4Weight, Int8Weight
from llmkern.ops._linear import FLOATS

BITS = (2, 3, 4, 8)
# How a zero point comes out of its field: as it is; the field plus one; the whole word plus one in every field.
ZERO_RULES = ("plain", "field", "word")
WHERE = "quantization_config (gptq)"
# What a rule of `dynamic` may change; other keys say how the weights were found.
OVERRIDES = ("bits", "group_size", "sym", "desc_act")


class GptqSchemes(Schemes):
    """One scheme for all layers, but for the rules of GPTQModel's `dynamic`."""

    method = "gptq"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """ValueError for a format that is not known, and for settings that are not possible."""
        version = choice(config, "checkpoint_format", config.get("format", "gptq"), ("gptq", "gptq_v2"), WHERE)
        choice(config, "pack_dtype", "int32", ("int32", None), WHERE)
        if config.get("is_marlin_format"):
            raise ValueError(f"{WHERE}: is_marlin_format: weights in the order of the Marlin kernel are not read")
        for key in ("adapter", "lora"):
            if config.get(key):
                raise ValueError(f"{WHERE}: {key}: the layers need an adapter beside their weights, which is not read")
        self.rule = "plain" if version == "gptq_v2" else "word" if _by_gptqmodel(config) else "field"
        self.base = self._scheme(config)
        self.head = choice(config, "lm_head", False, (True, False), WHERE)
        self.dynamic = self._dynamic(config.get("dynamic"), config)
        super().__init__((version,))

    def of(self, name: str, kind: str = "Linear", also: tuple[str, ...] = ()) -> Scheme | None:
        """The scheme of a module; the first rule of `dynamic` that matches decides, and `lm_head` about the head."""
        for pattern, scheme in self.dynamic:
            if any(pattern.match(known) for known in (name, *also)):
                return scheme
        return None if name.rpartition(".")[2] == "lm_head" and not self.head else self.base

    def _scheme(self, config: Mapping[str, Any]) -> Scheme:
        bits = integer(config, "bits", WHERE)
        if bits not in BITS:
            raise ValueError(f"{WHERE}: bits must be one of {', '.join(map(str, BITS))}, got {bits}")
        return Scheme(
            format="gptq_v2" if self.rule == "plain" else "gptq",
            bits=bits,
            symmetric=choice(config, "sym", False, (True, False), WHERE),
            group_size=group_size(config, WHERE),
            act_order=choice(config, "desc_act", False, (True, False), WHERE),
            zero_rule=self.rule,
        )

    def _dynamic(self, rules: Any, config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Scheme | None]]:
        if not rules:
            return []
        if not isinstance(rules, dict):
            raise ValueError(f"{WHERE}: dynamic must be an object, got {rules!r:.80}")
        found: list[tuple[re.Pattern[str], Scheme | None]] = []
        for key, changes in rules.items():
            pattern = check_pattern(key.removeprefix("-:").removeprefix("+:"), f"{WHERE}: dynamic")
            if key.startswith("-:"):
                found.append((pattern, None))
                continue
            if not isinstance(changes, dict):
                raise ValueError(f"{WHERE}: dynamic: {key} must be an object, got {changes!r:.80}")
            own = {name: value for name, value in changes.items() if name in OVERRIDES}
            found.append((pattern, self._scheme({**config, **own})))
        return found


def _by_gptqmodel(config: Mapping[str, Any]) -> bool:
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(str(name).lower().startswith("gptqmodel") for name in names)


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a layer [N, K]."""
    (n, k), groups = shape, scheme.groups(shape[1])
    if k * scheme.bits % 32 or n * scheme.bits % 32:
        raise BadTensor("qweight", f"needs K and N whose codes fill words of 32 bits, got K={k}, N={n}")
    return {
        "qweight": Part((torch.int32,), ((k * scheme.bits // 32, n),)),
        "qzeros": Part((torch.int32,), ((groups, n * scheme.bits // 32),)),
        "scales": Part(FLOATS, ((groups, n),)),
        "g_idx": Part(INTEGERS, ((k,),), optional=True),
    }


def read(scheme: Scheme, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Layer:
    """The packed layer, exact: the same codes, zero points, and scales in their own dtype."""
    (n, k), bits, groups = shape, scheme.bits, scheme.groups(shape[1])
    check_parts(layout(scheme, shape), tensors)
    check_scales("scales", tensors["scales"])
    order = None
    if (index := tensors.get("g_idx")) is not None:
        order = codes.order_of("g_idx", index, scheme.group_size or k, k, groups)
    found = {"scales": tensors["scales"].T.contiguous()}
    zeros = zero_points(scheme, tensors["qzeros"], n)
    if zeros is not None:
        found["zeros"] = zeros
    words = tensors["qweight"].T
    if bits == 4 and order is None:
        found["words"] = words.contiguous()
    else:
        found |= codes.repack(lambda rows: codes.unpack(words[rows], bits, k), shape, bits, order, words)
    kind = Int4Weight if bits <= 4 else Int8Weight
    return Layer(kind.from_tensors(found, shape=shape, group_size=min(scheme.group_size or k, k)), order)


def zero_points(scheme: Scheme, qzeros: Tensor, n: int) -> Tensor | None:
    """Zero points int8 [N, G] on the codes' signed range; None where all are its middle (symmetric)."""
    zeros = zeros_of(qzeros, scheme.bits, n, scheme.zero_rule)
    if not bool(zeros.any()):
        return None
    if scheme.symmetric:
        middle, at = 2 ** (scheme.bits - 1), [int(i) for i in zeros.nonzero()[0]]
        other, hint = ("plain", "gptq_v2") if scheme.zero_rule != "plain" else ("field", "gptq")
        wrong = f"; they are as {hint} stores them: checkpoint_format is wrong"
        raise BadTensor(
            "qzeros",
            f"must all be {middle}, since sym is true, got {int(zeros[tuple(at)]) + middle} at {at}"
            + ("" if bool(zeros_of(qzeros, scheme.bits, n, other).any()) else wrong),
        )
    return zeros.T.contiguous()


def zeros_of(qzeros: Tensor, bits: int, n: int, rule: str) -> Tensor:
    """Zero points int8 [G, N], less the middle of the range, of the stored words, by one of ZERO_RULES."""
    if rule == "word":
        qzeros = qzeros + _ones(bits, qzeros.shape[1]).to(qzeros.device)
    zeros = codes.unpack(qzeros, bits, n)
    if rule != "field":
        return zeros
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return torch.where(zeros == high, low, zeros + 1)


def _ones(bits: int, width: int) -> Tensor:
    """int32 [width]: the lowest bit of every field that begins in a word."""
    period = bits // gcd(32, bits)
    words = [0] * period
    for at in range(0, 32 * period, bits):
        words[at // 32] |= 1 << at % 32
    pattern = torch.tensor(words, dtype=torch.int64).repeat(-(-width // period))[:width]
    return torch.where(pattern >= 2**31, pattern - 2**32, pattern).to(torch.int32)
