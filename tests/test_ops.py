"""Every linear op, every kernel that runs here, every case of cases.py, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import BF16, CASES, DTYPES, F32, I8, LINEAR_CASES, ROWS_OF_X, LinearCase, expected, inputs, quantizes_x
from torch import Tensor

import llmkern
from llmkern import testing
from llmkern._registry import OPS

LINEAR_OPS = tuple(LINEAR_CASES)


@contextmanager
def forced(row: str) -> Iterator[None]:
    """Run ops on this kernel, ours with two threads (torch's own pool stalls when a machine is busy)."""
    if row != "reference":
        torch.set_num_threads(2)
    try:
        with llmkern.force(row):
            yield
    finally:
        torch.set_num_threads(1)


def make_bias(case: LinearCase, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(case.n, generator=generator).to(dtype)


def test_every_op_has_cases() -> None:
    assert set(CASES) == set(OPS)
    assert all(CASES.values())


@pytest.mark.of_ops(*LINEAR_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.usefixtures("poisoned")
def test_values(op: str, row: str, case: LinearCase, dtype: torch.dtype, generator: torch.Generator) -> None:
    for at, m in enumerate(ROWS_OF_X):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, DTYPES[at // 2]) if at % 2 else None
        with forced(row):
            y = OPS[op](*case.args(x, bias))
        assert y.dtype == dtype
        testing.assert_within(y, *expected(case, x, bias), f"{op} on {row}, {case}, M={m}")


@pytest.mark.of_ops(*LINEAR_OPS)
@pytest.mark.usefixtures("poisoned")
def test_every_number_of_rows(op: str, row: str, generator: torch.Generator) -> None:
    """Each number of rows has its own split into registers; beyond 512 rows x is packed in blocks."""
    case = next(case for case in CASES[op] if (case.n, case.k) == (33, 75) and case.value_dtype in (BF16, I8))
    bias = make_bias(case, generator)
    for m in (*range(2, 34), 530):
        x = torch.randn((m, case.k), generator=generator).bfloat16()
        with forced(row):
            y = OPS[op](*case.args(x, bias))
        testing.assert_within(y, *expected(case, x, bias), f"{op} on {row}, {case}, M={m}")


@pytest.mark.of_ops("sparse24_linear", "sparse24_int4_linear", "bitmask_linear")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("poisoned")
def test_many_rows_of_sparse_products(op: str, row: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Every width of a panel of x, K that ends anywhere in a block, groups that cross blocks, rows without values."""
    cases = [case for case in CASES[op] if case.k in (75, 260, 301, 2085)]
    for at, m in enumerate((31, 33, 41, 49, 57, 63, 64, 66, 97, 130, 513)):
        for case in cases[at % 2 :: 2]:
            x, bias = torch.randn((m, case.k), generator=generator).to(dtype), make_bias(case, generator)
            with forced(row):
                y = OPS[op](*case.args(x, bias))
            testing.assert_within(y, *expected(case, x, bias), f"{op} on {row}, {case}, M={m}")


@pytest.mark.of_ops(*LINEAR_OPS)
def test_layouts(op: str, row: str, generator: torch.Generator) -> None:
    for case in (CASES[op][1], CASES[op][-1]):
        for label, x in inputs(case.k, generator).items():
            with forced(row):
                y = OPS[op](*case.args(x, None))
            testing.assert_within(y, *expected(case, x, None), f"{op} on {row}, {case}, x {label}")


@pytest.mark.of_ops(*LINEAR_OPS)
def test_public_function_is_the_op(op: str, row: str, generator: torch.Generator) -> None:
    case = CASES[op][4]
    x, bias = torch.randn((2, 3, case.k), generator=generator), make_bias(case, generator)
    with forced(row):
        y = OPS[op](*case.args(x, bias))
        assert torch.equal(getattr(llmkern.ops, op)(x, case.weight(), bias), y)
        if op != "int8_dynamic_linear":  # not the first op of its weight
            assert torch.equal(llmkern.ops.linear(x, case.weight(), bias), y)


@pytest.mark.of_ops(*LINEAR_OPS)
@pytest.mark.parametrize("m", [1, 5, 40, 64])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_nan_stays_in_its_row(op: str, row: str, m: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    for case in (case for case in CASES[op] if (case.n, case.k) in ((33, 75), (64, 576))):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        x[m // 2] = torch.nan  # the whole row: a NaN at a column whose weights are all pruned may vanish
        with forced(row):
            y = OPS[op](*case.args(x, None))
        others = torch.arange(m) != m // 2
        assert y[others].isfinite().all(), f"{case}: row {m // 2} of x reached other rows"
        if op != "bitmask_linear":
            assert y[m // 2].isnan().all(), f"{case}: a NaN in x is missing from y"


@pytest.mark.of_ops("int4_linear", "int8_linear")
@pytest.mark.parametrize("m", [1, 3, 8])
def test_extreme_x(op: str, row: str, m: int, generator: torch.Generator) -> None:
    """Infinities meet single weights, not the sum of x, and tiny x keeps its bits."""
    case = LinearCase(op, 19, 192, group_size=64, symmetric=False)
    x = torch.randn((m, case.k), generator=generator)
    x[:, 70] = torch.inf
    with forced(row):
        y = OPS[op](*case.args(x, None))
    column = case.weight().unpack(torch.float64)[:, 70]
    wanted = torch.where(column == 0, torch.nan, column.sign() * torch.inf).expand(m, -1)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=0, equal_nan=True)
    for size in (1e-33, 1e-20, 1e30):
        x = torch.randn((m, case.k), generator=generator) * size
        with forced(row):
            y = OPS[op](*case.args(x, None))
        testing.assert_within(y, *expected(case, x, None), f"{op} on {row}, x about {size}")


@pytest.mark.of_ops("int4_linear", "int8_linear", "int8_dynamic_linear")
@pytest.mark.usefixtures("poisoned")
def test_rows_of_every_kind_of_strip(op: str, row: str, generator: torch.Generator) -> None:
    """Few rows of x: whole strips of columns, then whole chunks, then a short one, in whole groups or parts of them."""
    for k, group_size in ((1000, None), (576, 64), (1536, 512), (2080, 1024), (1984, 128), (1024, None), (40, None)):
        for symmetric in (True, False):
            case = LinearCase(op, 21, k, group_size=group_size, symmetric=symmetric, scale_dtype=BF16)
            for m in (1, 2, 3, 5, 8):
                x = torch.randn((m, k), generator=generator).bfloat16()
                with forced(row):
                    y = OPS[op](*case.args(x, None))
                testing.assert_within(y, *expected(case, x, None), f"{op} on {row}, {case}, M={m}")


@pytest.mark.of_ops(*LINEAR_OPS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_results_do_not_depend_on_threads(op: str, row: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    for case in CASES[op][-4:]:
        for m in (1, 20, 70):
            x, results = torch.randn((m, case.k), generator=generator).to(dtype), []
            for count in (1, 2, 3):
                with forced(row):
                    torch.set_num_threads(count)
                    results.append(OPS[op](*case.args(x, None)))
            if row == "reference":  # torch's own product; no promise of ours
                torch.testing.assert_close(results[1], results[0])
            else:
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])


@pytest.mark.of_ops("int8_dynamic_linear", "int4_linear")
@pytest.mark.usefixtures("poisoned")
def test_many_rows(op: str, row: str, generator: torch.Generator) -> None:
    """More rows than are quantized at a time, divided among threads as well as the weight is."""
    case = LinearCase(op, 20, 140, group_size=64, symmetric=False, extra=("int8",) if op == "int4_linear" else ())
    x, bias, results = torch.randn((1033, case.k), generator=generator), make_bias(case, generator), []
    for count in (2, 1):
        with forced(row):
            torch.set_num_threads(count)
            results.append(OPS[op](*case.args(x, bias)))
    testing.assert_within(results[0], *expected(case, x, bias), f"{op} on {row}, {case}")
    if row != "reference":
        assert torch.equal(results[0], results[1])


@pytest.mark.of_ops("int8_dynamic_linear", "int4_linear")
@pytest.mark.usefixtures("poisoned")
def test_quantized_rows_of_every_kind_of_group(op: str, row: str, generator: torch.Generator) -> None:
    """Groups of lanes, of parts of a block, of a block and of several; rows that end within each; K in pieces too."""
    extra, dtypes = ("int8",) if op == "int4_linear" else (), itertools.cycle((F32, torch.float16, BF16))
    for k, groups in ((2600, (4, 8, 16, 32, 64, 128, 256, None)), (576, (64, 128)), (96, (32,)), (75, (4, 8, 16))):
        for group_size in groups:
            for symmetric in (True, False):
                case = LinearCase(
                    op, 19, k, group_size=group_size, symmetric=symmetric, scale_dtype=next(dtypes), extra=extra
                )
                bias = make_bias(case, generator)
                for m in (1, 2, 4, 7, 8, 16):
                    x = torch.randn((m, k), generator=generator).bfloat16()
                    with forced(row):
                        y = OPS[op](*case.args(x, bias))
                    testing.assert_within(y, *expected(case, x, bias), f"{op} on {row}, {case}, M={m}")


@pytest.mark.of_ops("int8_linear", "int8_dynamic_linear", "int4_linear")
@pytest.mark.usefixtures("poisoned")
def test_a_nan_scale_stays_in_its_row(op: str, row: str, generator: torch.Generator) -> None:
    """Of the weight: what is read together with the last groups of the row before must not get into its sums."""
    extras: tuple[tuple, ...] = ((None,), ("int8",)) if op == "int4_linear" else ((),)
    for (k, group_size), extra in itertools.product(((576, 64), (1056, 32), (1040, 16), (1040, 8), (1036, 4)), extras):
        case = LinearCase(op, 40, k, group_size=group_size, extra=extra)
        args = list(case.args(torch.randn((3, k), generator=generator).bfloat16(), None))
        args[2] = args[2].clone()
        args[2][::2] = torch.nan
        with forced(row):
            y = OPS[op](*args)
        assert y[:, ::2].isnan().all()
        assert y[:, 1::2].isfinite().all(), f"{op} on {row}, {case}"


@pytest.mark.of_ops(*LINEAR_OPS)
def test_inputs_are_not_changed(op: str, row: str, generator: torch.Generator) -> None:
    case = CASES[op][3]
    args = case.args(torch.randn((9, case.k), generator=generator), make_bias(case, generator))
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    with forced(row):
        OPS[op](*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.of_ops("int8_dynamic_linear", "int4_linear")
def test_quantized_activations_at_the_edges(op: str, row: str, generator: torch.Generator) -> None:
    """Rows of zeros, of one value, of the largest magnitudes, and ties of the rounding."""
    for case in (case for case in CASES[op] if quantizes_x(case)):
        x = torch.randn((6, case.k), generator=generator)
        x[0], x[1], x[2] = 0.0, -3.25, 1e-30
        x[3] = torch.where(torch.arange(case.k) % 2 == 0, 1e30, -1e30)
        x[4] = torch.arange(case.k) % 128 - 63.5  # codes with halves: ties to even
        x[4, 0] = 127.0
        with forced(row):
            y = OPS[op](*case.args(x, None))
        testing.assert_within(y, *expected(case, x, None), f"{op} on {row}, {case}")


@pytest.mark.of_ops(*LINEAR_OPS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_results_are_rounded_to_nearest(op: str, row: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Small integers on both sides, so that every sum is exact in fp32 and only the store rounds."""
    for case in (case for case in CASES[op] if (case.n, case.k) in ((33, 75), (64, 576))):
        if op == "int4_linear" and quantizes_x(case):
            continue  # a scale per group of x, none of them a power of two
        for m in (1, 20):
            x = torch.randint(-3, 4, (m, case.k), generator=generator).to(dtype)
            x[:, 0] = 127  # quantized to int8, its scale is 1
            args = list(case.args(x, None))
            tensors = case.weight().tensors()
            if "scales" in tensors:
                args[place_of(op, "scales")] = torch.ones_like(tensors["scales"])
            else:
                args[place_of(op, "values")] = (tensors["values"] * 16).round()
            with forced("reference"):
                exact = OPS[op](x.float(), *args[1:])
            assert torch.equal(exact, exact.round())
            with forced(row):
                assert torch.equal(OPS[op](*args), exact.to(dtype)), f"{case}, M={m}"


@pytest.mark.of_ops("int4_linear", "sparse24_int4_linear")
def test_pad_nibbles_do_not_matter(op: str, row: str, generator: torch.Generator) -> None:
    for case in (case for case in CASES[op] if (case.n, case.k) == (33, 75)):
        args = list(case.args(torch.randn((9, case.k), generator=generator), None))
        used = case.k if op == "int4_linear" else 2 * -(-case.k // 4)
        assert used % 8
        with forced(row):
            clean = OPS[op](*args)
            args[1] = args[1].clone()
            args[1][:, -1] |= -1 << 4 * (used % 8)
            assert torch.equal(OPS[op](*args), clean)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_opcheck(op: str, generator: torch.Generator) -> None:
    case = CASES[op][1]
    layouts = inputs(case.k, generator)
    bias = make_bias(case, generator)
    for label in ("1-D", "2-D", "3-D", "transposed", "expanded rows", "every second column"):
        x = layouts[label].detach().requires_grad_(label != "expanded rows")
        torch.library.opcheck(OPS[op].op, case.args(x, bias.requires_grad_(label == "3-D")))
    for dtype in DTYPES[1:]:
        torch.library.opcheck(OPS[op].op, case.args(layouts["2-D"].to(dtype), None))


@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(op: str, dynamic: bool, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    case = CASES[op][4]
    w = case.weight()

    def model(x: Tensor) -> Tensor:
        return getattr(llmkern.ops, op)(x * 2, w) + 1

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for m in (3, 5, 8):
        x = torch.randn((m, case.k), generator=generator)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


@pytest.mark.of_ops(*LINEAR_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_gradients_are_those_of_the_dense_product(
    op: str, row: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = CASES[op][4]
    x = torch.randn((2, 3, case.k), generator=generator).to(dtype).requires_grad_()
    bias = make_bias(case, generator, dtype).requires_grad_()
    dy = torch.randn((2, 3, case.n), generator=generator).to(dtype)
    with forced(row):
        OPS[op](*case.args(x, bias)).backward(dy)
    assert x.grad.dtype == bias.grad.dtype == dtype
    columns = case.weight().unpack(torch.float64).T
    testing.assert_within(x.grad, dy.double() @ columns.T, testing.product_tolerance(dy, columns, None), "x")
    rounding = 3 * torch.finfo(dtype).eps * dy.double().abs().sum((0, 1))
    testing.assert_within(bias.grad, dy.double().sum((0, 1)), rounding, "bias")


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_packed_weights_have_no_gradient(op: str, generator: torch.Generator) -> None:
    case = next(case for case in CASES[op] if case.value_dtype == torch.float32 or "scales" in case.weight().tensors())
    args = list(case.args(torch.randn((2, case.k), generator=generator, requires_grad=True), None))
    at = next(i for i, arg in enumerate(args) if i and isinstance(arg, Tensor) and arg.is_floating_point())
    args[at] = args[at].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op}: .* requires a gradient.*gradients flow to x"):
        OPS[op](*args)


def swap(args: tuple, at: int, value: object) -> tuple:
    """args with another value at one place."""
    return (*args[:at], value, *args[at + 1 :])


def place_of(op: str, name: str) -> int:
    """Where the op's schema has an argument."""
    return [argument.name for argument in OPS[op].op._schema.arguments].index(name)


def refused(op: str, args: tuple, error: type[Exception], *words: str, fake: bool = True) -> None:
    """The call raises `error` in one line that names the op and holds every word; so does the fake if asked."""
    with pytest.raises(error) as raised:
        OPS[op](*args)
    message = str(raised.value)
    assert message.startswith(f"{op}: ")
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    if fake:
        with pytest.raises(error):
            OPS[op](*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bad_x_and_bias(op: str) -> None:
    case = CASES[op][3]
    x, n, k = torch.ones(2, case.k), case.n, case.k
    args = case.args(x, None)
    at = place_of(op, "bias")
    refused(op, swap(args, 0, torch.tensor(1.0)), ValueError, "x must be [..., K]", "scalar")
    refused(op, swap(args, 0, torch.ones(2, k + 9)), ValueError, f"K={k + 9}")
    refused(op, swap(args, 0, x[:, :-10]), ValueError, f"K={k - 10}")
    for dtype in (torch.float64, torch.int32, torch.int8, torch.bool):
        refused(op, swap(args, 0, x.to(dtype)), TypeError, "x must be float32", str(dtype))
    refused(op, swap(args, 0, x.to("meta")), ValueError, "cpu", "meta", fake=False)
    refused(op, swap(args, at, torch.ones(n + 1)), ValueError, f"bias must be [N]=[{n}]", f"[{n + 1}]")
    refused(op, swap(args, at, torch.ones(n, 1)), ValueError, "bias")
    refused(op, swap(args, at, torch.ones(n, dtype=torch.float64)), TypeError, "bias", "torch.float64")
    refused(op, swap(args, at, torch.ones(n, device="meta")), ValueError, "bias is on meta", fake=False)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bad_group_size(op: str) -> None:
    case = next(case for case in CASES[op] if case.n == 33 and case.group_size == 32)
    args = case.args(torch.ones(2, case.k), None)
    at = place_of(op, "group_size")
    for size in (0, -1, case.k + 1):
        refused(op, swap(args, at, size), ValueError, f"group_size must be in [1, K={case.k}], got {size}")
    refused(op, swap(args, at, 16), ValueError, "scales must be [N, G]=[33, 5]", "group_size=16", "[33, 3]")


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bad_weight_tensors(op: str) -> None:
    case = next(case for case in CASES[op] if case.n == 33 and case.group_size == 32)
    args = case.args(torch.ones(2, case.k), None)
    for name, tensor in case.weight().tensors().items():
        at = place_of(op, name)
        if tensor.dim() == 2:
            refused(op, swap(args, at, tensor[:, :-1].contiguous()), ValueError, name)
            refused(op, swap(args, at, tensor.flatten()), ValueError, name)
            refused(op, swap(args, at, tensor.T.contiguous().T), ValueError, f"{name} must be contiguous")
        refused(op, swap(args, at, tensor.to("meta")), ValueError, f"{name} is on meta", fake=False)
        with pytest.raises((TypeError, ValueError), match=f"^{op}: .*{name}.*float64"):
            OPS[op](*swap(args, at, tensor.double()))


def test_bad_kinds() -> None:
    case = CASES["int8_linear"][3]
    x, w = torch.ones(2, case.k), case.weight()
    with pytest.raises(TypeError, match=r"^int4_linear: w is a Int8Weight, .* one of int8_linear, int8_dynamic_linear"):
        llmkern.ops.int4_linear(x, w)
    with pytest.raises(TypeError, match=r"^linear: w must be a packed weight.*got Tensor"):
        llmkern.ops.linear(x, torch.ones(3, case.k))
    with pytest.raises(ValueError, match=r"^int8_linear: x is \[2, 74\], but w is \[N, K\]=\[33, 75\]"):
        llmkern.ops.linear(x[:, 1:], w)
    int4 = CASES["int4_linear"][3]
    with pytest.raises(ValueError, match=r"^int4_linear: activations must be None or \"int8\", got 'int4'"):
        llmkern.ops.int4_linear(torch.ones(2, int4.k), int4.weight(), activations="int4")


def test_int8_dynamic_refuses_sums_that_could_overflow() -> None:
    k = 2**31 // (127 * 255) + 1
    args = torch.ones(1, k), torch.ones(1, k, dtype=torch.int8), torch.ones(1, 1), None, None, k
    refused("int8_dynamic_linear", args, ValueError, f"K={k}", "overflow")
    OPS["int8_dynamic_linear"](args[0][:, 1:], args[1][:, 1:].contiguous(), *args[2:5], k - 1)


@pytest.mark.of_ops("int8_dynamic_linear")
def test_int8_dynamic_is_exact_at_the_largest_sums(op: str, row: str) -> None:
    k = 2**31 // (127 * 255)
    x, codes = torch.ones(1, k), torch.full((2, k), -128, dtype=torch.int8)
    codes[1] = 127
    zeros = torch.tensor([[127], [-128]], dtype=torch.int8)
    with forced(row):
        y = OPS[op](x, codes, torch.ones(2, 1), zeros, None, k)
    total = 127 * 255 * k
    torch.testing.assert_close(y.double(), torch.tensor([[-total, total]]).double() / 127, rtol=3e-7, atol=0)


@pytest.mark.of_ops(*LINEAR_OPS)
@pytest.mark.parametrize(("n", "k"), [(0, 16), (4, 0), (0, 0)])
def test_no_rows_or_no_columns(op: str, row: str, n: int, k: int) -> None:
    case = LinearCase(op, n, k)
    bias = torch.arange(n).float()
    with forced(row):
        for shape in ((3, k), (0, k), (k,), (2, 0, k)):
            y = OPS[op](*case.args(torch.ones(shape), bias))
            assert torch.equal(y, bias.expand(*shape[:-1], n))
