"""Packed weights: round trips bit by bit, the canonical layouts, and everything from_tensors refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import CASES, DTYPES, LINEAR_CASES, LinearCase
from torch import Tensor

from llmkern.formats import BitmaskWeight, Int4Weight, Int8Weight, Sparse24Int4Weight, Sparse24Weight
from llmkern.formats.int4 import pack_words
from llmkern.ops.int4_linear.reference import unpack_words

SIZES = [(1, 1), (7, 13), (33, 75), (5, 64), (17, 260), (0, 8), (3, 0)]
ALL_CASES = [case for cases in LINEAR_CASES.values() for case in cases]


def two_of_four(n: int, k: int, generator: torch.Generator) -> Tensor:
    """bool [N, K]: at most two of every four columns; 0, 1 or 2 are kept."""
    scores = torch.rand((n, -(-k // 4), 4), generator=generator)
    keep = scores >= scores.topk(2, dim=-1).values[..., 1:]
    keep &= torch.rand(keep.shape, generator=generator) < 0.9
    return keep.flatten(1)[:, :k]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: f"{case.op}-{case}")
def test_common_surface(case: LinearCase) -> None:
    w = case.weight()
    tensors = w.tensors()
    assert w.shape == (case.n, case.k)
    assert w.group_size == (case.group_size or case.k)
    assert w.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert w.device == torch.device("cpu")
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    again = type(w).from_tensors(tensors, shape=w.shape, group_size=w.group_size)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in tensors.items())
    assert set(again.tensors()) == set(tensors)
    dense = w.unpack()
    assert dense.dtype == torch.float32
    assert dense.shape == w.shape
    for dtype in DTYPES:
        assert torch.equal(w.unpack(dtype), dense.to(dtype))
    moved = w.to("meta")
    assert moved.device == torch.device("meta")
    assert type(moved) is type(w)
    assert (moved.shape, moved.group_size) == (w.shape, w.group_size)
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.group_size = 3


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_integer_round_trip(kind: type, n: int, k: int, symmetric: bool, generator: torch.Generator) -> None:
    bits = 8 if kind is Int8Weight else 4
    half = 2 ** (bits - 1)
    for group_size in (None, 1, 4, 32):
        if group_size is not None and group_size > k:
            continue
        n_groups = 0 if k == 0 else -(-k // (group_size or k))
        codes = torch.randint(-half, half, (n, k), generator=generator)
        scales = torch.rand((n, n_groups), generator=generator) + 0.5
        zeros = None if symmetric else torch.randint(-half, half, (n, n_groups), generator=generator).to(torch.int8)
        spread = (group_size or max(k, 1), 1)
        wide = scales.repeat_interleave(spread[0], dim=1)[:, :k]
        offset = 0 if zeros is None else zeros.repeat_interleave(spread[0], dim=1)[:, :k]
        w = kind.pack((codes - offset) * wide, group_size=group_size, scales=scales, zeros=zeros)
        found = w.codes if kind is Int8Weight else w.codes()
        assert found.dtype == torch.int8
        assert torch.equal(found.long(), codes)
        torch.testing.assert_close(w.unpack(torch.float32), (codes - offset) * wide, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_pack_rounds_to_nearest(kind: type, symmetric: bool, generator: torch.Generator) -> None:
    weight = torch.randn((9, 75), generator=generator)
    w = kind.pack(weight, group_size=20, symmetric=symmetric)
    step = w.scales.repeat_interleave(20, dim=1)[:, :75]
    assert (w.zeros is None) == symmetric
    # The ends of a group's range may lie half a step outside the grid, hence a whole one.
    assert ((w.unpack() - weight).abs() <= 1.0001 * step).all()
    assert ((w.unpack() - weight).abs() <= 0.5001 * step).float().mean() > 0.9


def test_int4_words_by_hand() -> None:
    codes = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7, 3]])
    words = pack_words(codes)
    # u = q + 8 = 0, 1, 7, 8, 9, a, e, f, then b; the first code is the least significant nibble.
    assert [int(word) & 0xFFFFFFFF for word in words[0]] == [0xFEA98710, 0x0000000B]
    assert words.dtype == torch.int32
    assert torch.equal(unpack_words(words, 9).long(), codes)


def test_int4_words_are_those_of_compressed_tensors(generator: torch.Generator) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for n, k in ((1, 8), (7, 13), (33, 75), (16, 256)):
        codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        assert torch.equal(pack_words(codes), helpers.pack_to_int32(codes, 4))


def test_sparse24_layout_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.0]])
    w = Sparse24Weight.pack(weight)
    # Quads keep (1, 3); (0, and 1 to fill up); (1 and 0 to fill up, in ascending order): nibbles 13, 4, 4.
    assert w.values.tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0, 4.0]]
    assert w.positions.tolist() == [[13 | 4 << 4, 4]]
    int4 = Sparse24Int4Weight.pack(weight, group_size=None, scales=torch.ones(1, 1))
    assert int4.codes().tolist() == [[1, 2, 3, 0, 0, 4]]
    assert [hex(int(word) & 0xFFFFFFFF) for word in int4.words[0]] == ["0xc88ba9"]
    assert torch.equal(int4.positions, w.positions)


def test_bitmask_layout_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.0], [0.0] * 10])
    w = BitmaskWeight.pack(weight, dtype=torch.bfloat16)
    assert w.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert w.bits.tolist() == [[0b00011010, 0b10], [0, 0]]
    assert w.row_offsets.tolist() == [0, 4, 4]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_float_round_trip(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    keep = two_of_four(n, k, generator)
    weight = (torch.randn((n, k), generator=generator) * keep).to(dtype)
    for mask in (None, keep):
        for kind in (Sparse24Weight, BitmaskWeight):
            w = kind.pack(weight, mask=mask)
            assert w.values.dtype == dtype
            assert torch.equal(w.unpack(dtype), weight)
    assert BitmaskWeight.pack(weight, mask=keep).values.numel() == int(keep.sum())
    full = torch.randn((n, k), generator=generator)
    assert torch.equal(BitmaskWeight.pack(full).unpack(), full)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_sparse_int_round_trip(n: int, k: int, generator: torch.Generator) -> None:
    keep = two_of_four(n, k, generator)
    for group_size in (None, 4, 32):
        if group_size is not None and group_size > k:
            continue
        n_groups = 0 if k == 0 else -(-k // (group_size or k))
        scales = torch.rand((n, n_groups), generator=generator) + 0.5
        wide = scales.repeat_interleave(group_size or max(k, 1), dim=1)[:, :k]
        for kind, bits, options in (
            (Sparse24Weight, 8, {"dtype": torch.int8}),
            (BitmaskWeight, 8, {"dtype": torch.int8}),
            (Sparse24Int4Weight, 4, {}),
        ):
            half = 2 ** (bits - 1)
            dense = torch.randint(-half, half, (n, k), generator=generator) * keep * wide
            w = kind.pack(dense, mask=keep, group_size=group_size, scales=scales, **options)
            torch.testing.assert_close(w.unpack(), dense, rtol=0, atol=0)


def test_pack_refuses_weights() -> None:
    ones = torch.ones(3, 8)
    for kind in (Int8Weight, Int4Weight, Sparse24Weight, Sparse24Int4Weight, BitmaskWeight):
        name = kind.__name__
        with pytest.raises(ValueError, match=rf"^{name}: weight must be \[N, K\], got \[8\]"):
            kind.pack(ones[0])
        with pytest.raises(TypeError, match=f"^{name}: weight must be a float tensor, got torch.int32"):
            kind.pack(ones.int())
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = torch.zeros(3, 8)
            bad[1, 2] = value
            with pytest.raises(ValueError, match=f"^{name}: weights hold a NaN or an infinity"):
                kind.pack(bad)
        for size in (0, -4, 9, 4.0, True):
            with pytest.raises(
                ValueError, match=rf"^{name}: group_size must be None or an int in \[1, K=8\], got {size}"
            ):
                kind.pack(torch.zeros(3, 8), group_size=size)


def test_pack_refuses_masks_and_what_is_not_two_of_four() -> None:
    weight = torch.zeros(2, 10)
    weight[1, 4:7] = 1.0
    for kind in (Sparse24Weight, Sparse24Int4Weight):
        name = kind.__name__
        with pytest.raises(ValueError, match=rf"^{name}: not 2:4: row 1 keeps more than two of columns 4\.\.7"):
            kind.pack(weight, group_size=None)
        with pytest.raises(ValueError, match=f"^{name}: group_size must be a multiple of 4 .*got 6"):
            kind.pack(torch.zeros(2, 10), group_size=6)
    for kind in (Sparse24Weight, Sparse24Int4Weight, BitmaskWeight):
        name = kind.__name__
        with pytest.raises(ValueError, match=rf"^{name}: mask must be \[2, 10\], got \[2, 9\]"):
            kind.pack(weight, mask=torch.ones(2, 9, dtype=torch.bool), group_size=None)
        with pytest.raises(ValueError, match=f"^{name}: weight is not 0 where the mask prunes it"):
            kind.pack(weight, mask=torch.zeros(2, 10, dtype=torch.bool), group_size=None)


def changed(tensor: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    """A copy with one element changed."""
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def refused(case: LinearCase, words: str, /, **tensors: Tensor | None) -> None:
    """from_tensors of the case with other tensors (None: left out) raises ValueError naming the class and `words`."""
    w = case.weight()
    found = {name: tensor for name, tensor in (w.tensors() | tensors).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"^{type(w).__name__}: .*{words}"):
        type(w).from_tensors(found, shape=w.shape, group_size=w.group_size)


GROUPED = [next(case for case in cases if case.group_size == 32) for cases in LINEAR_CASES.values()]


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.op)
def test_refuses_tensors_in_general(case: LinearCase) -> None:
    w = case.weight()
    required = [
        name for name in w.tensors() if name != "scales" or w.ops[0] not in ("sparse24_linear", "bitmask_linear")
    ]
    for name in required:
        refused(case, f"missing tensor '{name}'", **{name: None})
    refused(case, "unknown tensor 'extra'; known: ", extra=torch.zeros(1))
    for name, tensor in w.tensors().items():
        wider = torch.cat([tensor, tensor[:1]])
        refused(case, rf"{name} must be \[.*got \[{wider.shape[0]}", **{name: wider})
        refused(case, f"{name} must be .*got float64", **{name: tensor.double()})
        refused(case, "tensors are on different devices: cpu, meta", **{name: tensor.to("meta")})
    for value in (torch.nan, torch.inf, -torch.inf, 0.0, -1.0):
        scales = changed(w.scales.float(), (1, 2), value)
        refused(case, f"scales must be finite and positive, got {value} at row 1, group 2", scales=scales)
    refused(case, r"scales must be \[33, 3\]", scales=w.scales[:, :2])
    for size in (0, -1, 76, 2.0):
        with pytest.raises(ValueError, match=rf"group_size must be None or an int in \[1, K=75\], got {size}"):
            type(w).from_tensors(w.tensors(), shape=w.shape, group_size=size)
    for shape in ((33,), (33, -1), (33, 75, 1), (33, 74.5)):
        with pytest.raises(ValueError, match=r"shape must be \(N, K\)"):
            type(w).from_tensors(w.tensors(), shape=shape, group_size=w.group_size)
    with pytest.raises(ValueError, match=r"must be \[34, "):
        type(w).from_tensors(w.tensors(), shape=(34, 75), group_size=w.group_size)


@pytest.mark.parametrize("op", ["int8_linear", "int4_linear"])
def test_refuses_zeros(op: str) -> None:
    case = next(case for case in CASES[op] if case.group_size == 20)
    zeros = case.weight().zeros
    refused(case, r"zeros must be \[33, 4\], got \[33, 3\]", zeros=zeros[:, :3])
    refused(case, "zeros must be int8, got int32", zeros=zeros.int())
    if op == "int4_linear":
        for value in (8, -9):
            refused(case, r"zeros must be in \[-8, 7\]", zeros=changed(zeros, (2, 1), value))


@pytest.mark.parametrize("op", ["sparse24_linear", "sparse24_int4_linear"])
def test_refuses_positions(op: str) -> None:
    case = next(case for case in CASES[op] if case.group_size == 32)
    positions = case.weight().positions
    byte = int(positions[1, 1]) & 0x0F
    for nibble in (0, 5, 10, 15, 1, 2, 3, 6, 7, 11):  # equal, then descending
        words = rf"two positions must be distinct and ascending, got \[{nibble & 3}, {nibble >> 2}\] at row 1, quad 3"
        refused(case, words, positions=changed(positions, (1, 1), byte | nibble << 4))


@pytest.mark.parametrize("op", ["sparse24_linear", "bitmask_linear"])
def test_refuses_values(op: str) -> None:
    floats = next(case for case in CASES[op] if case.k == 75 and case.value_dtype == torch.float32)
    values = floats.weight().values
    for value in (torch.nan, torch.inf):
        refused(floats, "values hold a NaN or an infinity", values=changed(values, (0,) * values.dim(), value))
    refused(floats, "scales go with int8 values and only with them", scales=torch.ones(33, 1))
    integers = next(case for case in CASES[op] if case.group_size == 32)
    refused(integers, "scales go with int8 values and only with them", scales=None)


def test_bitmask_refuses_bits_and_offsets() -> None:
    case = next(case for case in CASES["bitmask_linear"] if case.group_size == 32)
    w = case.weight()
    last = int(w.bits[4, -1])
    refused(case, "a pad bit beyond column 74 is set", bits=changed(w.bits, (4, -1), last | 8))
    refused(case, "row_offsets do not match", bits=changed(w.bits, (4, 0), int(w.bits[4, 0]) ^ 1))
    refused(case, "row_offsets do not match", row_offsets=changed(w.row_offsets, (3,), int(w.row_offsets[3]) + 1))
    refused(case, "row_offsets do not match", row_offsets=w.row_offsets + 1)
    refused(case, rf"values must be \[{w.values.numel()}\]", values=w.values[:-1])
