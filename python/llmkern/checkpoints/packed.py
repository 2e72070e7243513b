"""compressed-tensors' `pack-quantized` and `int-quantized` layers.

weight_packed      int32 [N, W]        codes u = q + 2^(bits - 1) along K, dense or padded (`codes`)
weight             int8 [N, K]         instead of it, in int-quantized
weight_scale       [N, G], or [1] for the whole layer
weight_zero_point  int32 [V, G]        packed along N as the codes along K; int8 [N, G] in int-quantized
weight_shape       int64 [2]           N, K
weight_g_idx       int32 [K]           the group of each column; -1 everywhere for none
input_scale, input_zero_point   [1]    of activations with a fixed scale: checked, not used
                                       w = (q - zero) * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.checkpoints import codes
from llmkern.checkpoints.scheme import INTEGERS, BadTensor, Layer, Part, Scheme, check_parts, check_scales, scales_part
from llmkern.formats import Int4Weight, Int8Weight
from llmkern.formats.bit_words import width
from llmkern.formats.int4 import pack_words
from llmkern.ops._linear import FLOATS

ONE = ((1,), ())


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a layer [N, K]."""
    (n, k), groups, bits = shape, scheme.groups(shape[1]), scheme.bits
    found = {"weight_scale": Part(FLOATS, ONE) if scheme.per_tensor else scales_part(n, groups)}
    zeros: tuple[tuple[int, ...], ...] = ONE if scheme.per_tensor else ((n, groups),)
    dtypes: tuple[torch.dtype, ...] = (torch.int8,)
    if scheme.format == "int-quantized":
        found["weight"] = Part((torch.int8,), ((n, k),))
    else:
        found["weight_packed"] = Part(
            (torch.int32,), tuple((n, words(k, bits)) for words in (width, codes.padded_width))
        )
        found["weight_shape"] = Part(INTEGERS, ((2,),))
        if not scheme.per_tensor:
            dtypes += (torch.int32,)
            zeros = ((width(n, bits), groups), (codes.padded_width(n, bits), groups), *zeros)
    found["weight_zero_point"] = Part(dtypes[::-1], zeros, optional=scheme.symmetric)
    found["weight_g_idx"] = Part(INTEGERS, ((k,),), optional=True)
    found["input_scale"] = Part(FLOATS, ONE, optional=True)
    found["input_zero_point"] = Part((torch.int8, *FLOATS, *INTEGERS), ONE, optional=True)
    return found


def read(scheme: Scheme, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Layer:
    """The packed layer, exact: the same codes, zero points, and scales in their own dtype."""
    (n, k), bits = shape, scheme.bits
    check_parts(layout(scheme, shape), tensors)
    for leaf in ("weight_scale", "input_scale"):
        if leaf in tensors:
            check_scales(leaf, tensors[leaf])
    check_shape("weight_shape", tensors.get("weight_shape"), shape)
    order = _order(scheme, tensors.get("weight_g_idx"), k)
    scale = tensors["weight_scale"]
    found = {"scales": scale.reshape(1, 1).repeat(n, 1) if scheme.per_tensor else scale}
    if scheme.format == "int-quantized":
        found |= _from_bytes(tensors["weight"], bits, order)
        word_layout = None
    else:
        word_layout = _word_layout("weight_packed", scheme, tensors["weight_packed"], k, scheme.word_layout)
        found |= _from_words(tensors["weight_packed"], shape, bits, order, word_layout)
    zeros = _zeros(scheme, tensors.get("weight_zero_point"), found["scales"], word_layout)
    if zeros is not None:
        found["zeros"] = zeros
    kind = Int4Weight if bits <= 4 else Int8Weight
    return Layer(kind.from_tensors(found, shape=shape, group_size=min(scheme.group_size or k, k)), order)


def check_shape(leaf: str, stored: Tensor | None, shape: tuple[int, int]) -> None:
    """BadTensor unless the stored shape is the layer's."""
    if stored is not None and stored.flatten().tolist() != list(shape):
        raise BadTensor(leaf, f"must be {list(shape)} as in the model, got {stored.flatten().tolist()}")


def _order(scheme: Scheme, index: Tensor | None, k: int) -> Tensor | None:
    if index is None or bool((index == -1).all()):
        return None
    return codes.order_of("weight_g_idx", index, scheme.group_size or k, k, scheme.groups(k))


def _from_bytes(weight: Tensor, bits: int, order: Tensor | None) -> dict[str, Tensor]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if weight.numel() and not (int(weight.min()) >= low and int(weight.max()) <= high):
        raise BadTensor("weight", f"must be in [{low}, {high}], got {int(weight.min())} to {int(weight.max())}")
    if order is not None:
        weight = weight[:, order]
    return {"words": pack_words(weight)} if bits <= 4 else {"codes": weight}


def _from_words(
    words: Tensor, shape: tuple[int, int], bits: int, order: Tensor | None, word_layout: str | None
) -> dict[str, Tensor]:
    k = shape[1]
    if order is None and bits == 4:
        return {"words": words}
    if order is None and bits == 8 and k % 4 == 0:
        return {"codes": words.contiguous().view(torch.uint8).bitwise_xor(128).view(torch.int8)}
    return codes.repack(lambda rows: codes.unpack(words[rows], bits, k, word_layout), shape, bits, order, words)


def _word_layout(leaf: str, scheme: Scheme, words: Tensor, count: int, known: str | None) -> str | None:
    """How codes lie in their words, None where both ways are one: by the width of a row of `count` codes, else as
    `known`, else by the bits that are left 0.
    """
    bits = scheme.bits
    dense, padded = width(count, bits), codes.padded_width(count, bits)
    if 32 % bits == 0 or count <= 32 // bits:
        return None
    if dense != padded:
        return "dense" if words.shape[1] == dense else "padded"
    if known:
        return known
    possible = [name for name in ("dense", "padded") if _rest_is_zero(words, bits, count, name)]
    if len(possible) != 1:
        raise BadTensor(
            leaf,
            f"of {count} codes of {bits} bits is {dense} words wide with and without padding; the config's version "
            "must tell which",
        )
    return possible[0]


def _rest_is_zero(words: Tensor, bits: int, k: int, name: str) -> bool:
    """Whether the bits that hold no code are 0, as they are where this is the layout."""
    used = torch.zeros(words.shape[1] * 32, dtype=torch.int64)
    per_word = 32 // bits
    for code in range(k):
        start = code * bits if name == "dense" else code // per_word * 32 + code % per_word * bits
        used[start : start + bits] = 1
    masks = (used.view(-1, 32) << torch.arange(32)).sum(1)
    return not bool(((words.to(torch.int64) & 0xFFFFFFFF) & ~masks.to(words.device)).any())


def _zeros(scheme: Scheme, stored: Tensor | None, scales: Tensor, word_layout: str | None) -> Tensor | None:
    """Zero points int8 [N, G]; None where all are 0."""
    if stored is None:
        return None
    n, bits = scales.shape[0], scheme.bits
    if stored.dtype == torch.int32:
        words = stored.T.contiguous()
        own = _word_layout("weight_zero_point", scheme, words, n, word_layout or scheme.word_layout)
        zeros = codes.unpack(words, bits, n, own).T.contiguous()
    else:
        zeros = stored.reshape(1, 1).repeat(n, 1) if scheme.per_tensor else stored
    if not bool(zeros.any()):
        return None
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if scheme.symmetric:
        raise BadTensor("weight_zero_point", "must be 0 everywhere, since symmetric is true")
    if not (int(zeros.min()) >= low and int(zeros.max()) <= high):
        raise BadTensor("weight_zero_point", f"must be in [{low}, {high}], got {int(zeros.min())}..{int(zeros.max())}")
    return zeros
