"""One layer of every format, bits and kind of grid: the packed weight is exactly what the format defines."""

import pytest
import torch
from foreign import (
    awq,
    dense_row,
    gptq,
    int32,
    int_quantized,
    make,
    marlin_24,
    mask_24,
    pack_quantized,
    padded_row,
    sparse_24_bitmask,
    sparse_bitmask,
)

from llmkern.checkpoints import BadTensor, Scheme, read_layer, stack
from llmkern.checkpoints.codes import unpack
from llmkern.formats import BitmaskWeight, Int4Weight, Int8Weight, Sparse24Int4Weight, Sparse24Weight
from llmkern.nn import PackedLinear

ALL_BITS = (2, 3, 4, 8)


def dense(layer):
    return PackedLinear(layer.weight, input_order=layer.input_order).unpack()


def assert_exact(layer, wanted, dtype):
    assert torch.equal(dense(layer), wanted)
    assert layer.weight.scales.dtype == dtype


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", [False, True])
def test_gptq(bits, symmetric, group, version, order):
    made = make(32, 96, bits, symmetric=symmetric, group=group, order=order)
    rule = "plain" if version == "gptq_v2" else "field"
    scheme = Scheme(version, bits, symmetric, group, act_order=order, zero_rule=rule)
    layer = read_layer(scheme, gptq(made, version), (32, 96))
    assert_exact(layer, made.dense(), torch.float16)
    assert type(layer.weight) is (Int8Weight if bits == 8 else Int4Weight)
    assert (layer.weight.zeros is None) == symmetric
    assert (layer.input_order is not None) == (order and group is not None)
    assert type(layer.weight).__name__ == scheme.packed


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("borrow", [False, True])
def test_gptq_v1_zero_points_of_zero(bits, borrow):
    """z = 0 is stored as all ones, and where whole words were subtracted it borrows from its neighbour."""
    made = make(64, 64, bits, symmetric=False, group=32, low_zero=0)
    made.z[5], made.z[6] = 0, 0
    made.z[63] = 0
    tensors = gptq(made, borrow=borrow)
    scheme = Scheme("gptq", bits, False, 32, zero_rule="word" if borrow else "field")
    assert_exact(read_layer(scheme, tensors, (64, 64)), made.dense(), torch.float16)


def test_the_two_rules_of_v1_differ_only_where_a_zero_point_is_zero():
    made = make(64, 64, 4, symmetric=False, group=32, low_zero=0)
    made.z[3] = 0
    made.z[4] = 5
    wrong = read_layer(Scheme("gptq", 4, False, 32, zero_rule="field"), gptq(made, borrow=True), (64, 64))
    rows = (dense(wrong) != made.dense()).any(1)
    assert rows[4]
    assert not rows[3]


def test_gptq_without_g_idx_is_in_order():
    made = make(32, 64, 4, symmetric=True, group=16)
    tensors = gptq(made)
    del tensors["g_idx"]
    assert_exact(
        read_layer(Scheme("gptq", 4, True, 16, zero_rule="field"), tensors, (32, 64)), made.dense(), torch.float16
    )


def test_a_last_group_that_is_short():
    made = make(32, 72, 4, symmetric=False, group=32, order=True)
    layer = read_layer(Scheme("gptq", 4, False, 32, zero_rule="field"), gptq(made), (32, 72))
    assert_exact(layer, made.dense(), torch.float16)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("shape", [(40, 96), (8, 32)])
def test_awq(zero_point, group, shape):
    made = make(*shape, 4, symmetric=not zero_point, group=group)
    scheme = Scheme("awq", 4, not zero_point, group)
    assert_exact(read_layer(scheme, awq(made, zero_point), shape), made.dense(), torch.float16)


def test_awq_in_several_parts(monkeypatch):
    monkeypatch.setattr("llmkern.checkpoints.codes.PART", 1 << 11)
    made = make(88, 96, 4, symmetric=False, group=32)
    assert_exact(read_layer(Scheme("awq", 4, False, 32), awq(made), (88, 96)), made.dense(), torch.float16)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pack_quantized(bits, symmetric, group, dtype):
    shape = (33, 160)
    made = make(*shape, bits, symmetric=symmetric, group=group, dtype=dtype)
    scheme = Scheme("pack-quantized", bits, symmetric, group)
    layer = read_layer(scheme, pack_quantized(made, symmetric=symmetric), shape)
    assert_exact(layer, made.dense(), dtype)
    assert (layer.weight.zeros is None) == symmetric


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_padded_words_are_told_by_their_width(bits, symmetric):
    shape = (96, 160)
    made = make(*shape, bits, symmetric=symmetric, group=32)
    tensors = pack_quantized(made, symmetric=symmetric, row=padded_row)
    layer = read_layer(Scheme("pack-quantized", bits, symmetric, 32), tensors, shape)
    assert_exact(layer, made.dense(), torch.float16)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_words_of_one_width_are_told_by_the_version_or_by_what_is_zero(padded, told):
    """3 bits, K = 40: four words either way."""
    made = make(4, 40, 3, symmetric=True)
    tensors = pack_quantized(made, symmetric=True, **({"row": padded_row} if padded else {}))
    assert tensors["weight_packed"].shape == (4, 4)
    scheme = Scheme("pack-quantized", 3, word_layout=("padded" if padded else "dense") if told else None)
    assert_exact(read_layer(scheme, tensors, (4, 40)), made.dense(), torch.float16)


def test_words_that_could_be_either_are_refused():
    made = make(4, 40, 3, symmetric=True)
    tensors = pack_quantized(made, symmetric=True)
    tensors["weight_packed"].fill_(1)
    with pytest.raises(BadTensor, match="weight_packed of 40 codes of 3 bits is 4 words wide with and without"):
        read_layer(Scheme("pack-quantized", 3), tensors, (4, 40))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_pack_quantized_with_columns_in_the_order_of_an_index(bits):
    made = make(24, 96, bits, symmetric=False, group=32, order=True)
    layer = read_layer(
        Scheme("pack-quantized", bits, False, 32, act_order=True),
        pack_quantized(made, symmetric=False, index=True), (24, 96),
    )  # fmt: skip
    assert layer.input_order is not None
    assert_exact(layer, made.dense(), torch.float16)


def test_an_index_of_minus_ones_is_none():
    made = make(8, 64, 4, symmetric=True, group=32)
    tensors = pack_quantized(made, symmetric=True) | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    layer = read_layer(Scheme("pack-quantized", 4, True, 32), tensors, (8, 64))
    assert layer.input_order is None
    assert_exact(layer, made.dense(), torch.float16)


@pytest.mark.parametrize("scale", [torch.tensor([0.03125]), torch.tensor(0.03125)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_the_layer(scale, symmetric):
    made = make(16, 32, 8, symmetric=True)
    made.s, made.z = torch.full((16, 1), 0.03125), torch.full((16, 1), 128 if symmetric else 131)
    tensors = int_quantized(made) | {"weight_scale": scale}
    if not symmetric:
        tensors["weight_zero_point"] = torch.tensor([3], dtype=torch.int8)
    layer = read_layer(Scheme("int-quantized", 8, symmetric, per_tensor=True), tensors, (16, 32))
    assert_exact(layer, made.dense(), torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized(bits, symmetric):
    made = make(16, 36, bits, symmetric=symmetric, dtype=torch.bfloat16)
    tensors = int_quantized(made, symmetric=symmetric)
    layer = read_layer(Scheme("int-quantized", bits, symmetric, activations="int8"), tensors, (16, 36))
    assert_exact(layer, made.dense(), torch.bfloat16)
    if symmetric:  # older files hold the zeros too
        tensors["weight_zero_point"] = torch.zeros(16, 1, dtype=torch.int8)
        assert read_layer(Scheme("int-quantized", bits), tensors, (16, 36)).weight.zeros is None


@pytest.mark.parametrize("k", [32, 36, 44])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sparse_24_bitmask(k, dtype, generator):
    mask = mask_24(12, k, generator)
    values = torch.randn(12, k, generator=generator).to(dtype) * mask
    values[3, :4] = 0  # kept all the same
    layer = read_layer(Scheme("sparse-24-bitmask"), sparse_24_bitmask(values, mask), (12, k))
    assert type(layer.weight) is Sparse24Weight
    assert layer.weight.values.dtype == dtype
    assert torch.equal(layer.weight.unpack(), values.float())


@pytest.mark.parametrize("group", [16, None])
def test_sparse_24_bitmask_of_codes(group, generator):
    mask = mask_24(12, 32, generator)
    made = make(12, 32, 8, symmetric=True, group=group)
    made.u = torch.where(mask, made.u, 128)
    tensors = sparse_24_bitmask((made.u - 128).to(torch.int8), mask) | {"weight_scale": made.s}
    layer = read_layer(Scheme("sparse-24-bitmask", 8, group_size=group), tensors, (12, 32))
    assert type(layer.weight) is Sparse24Weight
    assert_exact(layer, made.dense(), torch.float16)


@pytest.mark.parametrize("k", [32, 37])
def test_sparse_bitmask(k, generator):
    mask = torch.rand(12, k, generator=generator) < 0.4
    mask[2] = False
    values = torch.randn(12, k, generator=generator) * mask
    layer = read_layer(Scheme("sparse-bitmask"), sparse_bitmask(values, mask), (12, k))
    assert type(layer.weight) is BitmaskWeight
    assert torch.equal(layer.weight.unpack(), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [128, None])
@pytest.mark.parametrize("shape", [(64, 256), (192, 384)])
def test_marlin_24(bits, group, shape, generator):
    n, k = shape
    made = make(n, k, bits, symmetric=True, group=group)
    made.u = torch.where(mask_24(n, k, generator), made.u, 2 ** (bits - 1))
    tensors = marlin_24(made.u - 2 ** (bits - 1), made.s, bits, group)
    layer = read_layer(Scheme("marlin-24", bits, group_size=group), tensors, shape)
    assert type(layer.weight) is (Sparse24Int4Weight if bits == 4 else Sparse24Weight)
    assert_exact(layer, made.dense(), torch.float16)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_are_left_out_where_asked(bits, generator):
    made = make(12, 36, bits, symmetric=True, group=12)
    made.u = torch.where(mask_24(12, 36, generator), made.u, 2 ** (bits - 1))
    tensors, scheme = pack_quantized(made, symmetric=True), Scheme("pack-quantized", bits, True, 12)
    layer = read_layer(scheme, dict(tensors), (12, 36), find_24=True)
    assert type(layer.weight) is (Sparse24Int4Weight if bits == 4 else Sparse24Weight)
    assert_exact(layer, made.dense(), torch.float16)
    assert type(read_layer(scheme, tensors, (12, 36)).weight) is (Int4Weight if bits == 4 else Int8Weight)
    made.u[11, 32:35] = 1
    layer = read_layer(scheme, pack_quantized(made, symmetric=True), (12, 36), find_24=True)
    assert type(layer.weight) is (Int4Weight if bits == 4 else Int8Weight)
    assert_exact(layer, made.dense(), torch.float16)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_layers_become_one(bits):
    parts = [make(32, 96, bits, symmetric=symmetric, group=32, order=True, seed=0) for symmetric in (True, False)]
    parts[1].index = parts[0].index
    layers = [read_layer(Scheme("gptq_v2", bits, False, 32), gptq(part, "gptq_v2"), (32, 96)) for part in parts]
    layer = stack(layers)
    assert layer.weight.shape == (64, 96)
    assert_exact(layer, torch.cat([part.dense() for part in parts]), torch.float16)
    other = make(32, 96, bits, symmetric=True, group=32, order=True, seed=1)
    with pytest.raises(ValueError, match=r"one class, K, group size and order of columns, got .* in another order"):
        stack([layers[0], read_layer(Scheme("gptq_v2", bits, True, 32), gptq(other, "gptq_v2"), (32, 96))])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 64, 100])
def test_words_of_every_width(bits, count):
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(count))
    for row, layout in ((dense_row, "dense"), (padded_row, "padded")):
        words = int32([row(line, bits) for line in codes.tolist()])
        assert torch.equal(unpack(words, bits, count, layout), codes - 2 ** (bits - 1))
