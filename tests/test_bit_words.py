import pytest
import torch

from llmkern.formats import compressed_tensors as ct
from llmkern.formats import gptq_checkpoint
from llmkern.formats.bit_words import BITS, pack_codes, unpack_codes, width

SIZES = [(1, 1), (1, 8), (7, 13), (5, 31), (33, 75), (16, 256), (3, 32), (2, 0), (0, 4)]


def random_codes(n, k, bits, generator):
    low = -(1 << (bits - 1))
    return torch.randint(low, -low, (n, k), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_a_row_of_bits(bits, generator):
    """Bit by bit with Python's integers: code i is bits i*b to i*b+b-1 of one number, words its 32-bit digits."""
    for n, k in SIZES:
        codes = random_codes(n, k, bits, generator)
        words = pack_codes(codes, bits)
        assert words.dtype == torch.int32
        assert list(words.shape) == [n, width(k, bits)] == [n, -(-k * bits // 32)]
        for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
            number = sum((q + (1 << (bits - 1))) << (i * bits) for i, q in enumerate(row))
            assert [word & 0xFFFFFFFF for word in packed] == [
                number >> (32 * at) & 0xFFFFFFFF for at in range(len(packed))
            ]
        assert torch.equal(unpack_codes(words, bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_compressed_tensors(bits, generator):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for n, k in SIZES[:-2]:
        codes = random_codes(n, k, bits, generator)
        assert torch.equal(pack_codes(codes, bits), helpers.pack_to_int32(codes, bits))
        assert torch.equal(ct.pack_zeros(codes, bits), helpers.pack_to_int32(codes, bits, packed_dim=0))


def test_large_matrices_are_packed_in_parts(generator):
    codes = random_codes(40, 1 << 15, 3, generator)
    words = pack_codes(codes, 3)
    assert torch.equal(unpack_codes(words, 3, 1 << 15), codes)
    assert torch.equal(words[17:18], pack_codes(codes[17:18], 3))


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_other_strides(bits, generator):
    """A turned column is contiguous to torch, with the strides of a column."""
    codes = random_codes(40, 1, bits, generator)
    words = pack_codes(codes.T, bits)
    assert torch.equal(words, pack_codes(codes.T.clone(memory_format=torch.preserve_format).reshape(1, 40), bits))
    assert torch.equal(unpack_codes(words.T.contiguous().T, bits, 40), codes.T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(5, 7), (8, 8), (1, 1), (33, 12)])
def test_zero_points_survive_packing(bits, n, k, generator):
    zeros = random_codes(n, k, bits, generator)
    words = ct.pack_zeros(zeros, bits)
    assert words.shape == (-(-n * bits // 32), k)
    assert torch.equal(ct.unpack_zeros(words, n, bits), zeros)


def test_the_zero_points_of_gptq_v1():
    """Symmetric: the middle of the range less one, in every field."""
    known = {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}
    for bits, word in known.items():
        assert (gptq_checkpoint.zero_words(3, 32, bits) == word).all()
    threes = gptq_checkpoint.zero_words(1, 32, 3)[0].tolist()
    number = sum((word & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(threes))
    assert [number >> (3 * at) & 7 for at in range(32)] == [3] * 32


@pytest.mark.parametrize("bits", BITS[:3])
def test_codes_that_need_more_bits_are_refused(bits):
    high = 1 << (bits - 1)
    for code in (high, -high - 1):
        with pytest.raises(ValueError, match=rf"codes of {bits} bits must be in \[-{high}, {high - 1}\]"):
            pack_codes(torch.tensor([[0, code]], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", [0, 1, 5, 16, True])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8"):
        pack_codes(torch.zeros(1, 1, dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(9).int()])
def test_words_of_another_size_are_refused(bits, bad):
    with pytest.raises(ValueError, match=r"wanted int32 \[N, "):
        unpack_codes(bad, bits, 20)
