"""Every linear op on every kernel of the device against float64: odd sizes, dtypes, layouts, what lies around."""

from __future__ import annotations

import on_device
import pytest
import torch
from cases import DTYPES, LinearCase, inputs
from on_device import (
    FEW_MS,
    HALVES,
    LINEAR_OPS,
    MS,
    Runner,
    args_of,
    assert_right,
    bias_of,
    call,
    cases,
    each_case,
    each_dtype,
    each_half,
    each_kernel,
    exact_and_tolerance,
    few_cases,
    only_cuda,
    refusal,
    result_or_error,
    rows,
    weight_args,
)
from torch import Tensor

from llmkern import testing
from llmkern._registry import OPS


@each_case(*LINEAR_OPS)
@each_dtype
@pytest.mark.usefixtures("poisoned")
def test_values(op: str, kernel: str, case: LinearCase, dtype: torch.dtype, generator: torch.Generator) -> None:
    run = Runner(op, kernel)
    x = rows(max(MS), case.k, generator, dtype)
    for kind in (None, *DTYPES[1:2]):
        bias = None if kind is None else bias_of(case, generator, kind)
        exact, tolerance = exact_and_tolerance(case, x, bias)
        for m in MS[:: 1 if bias is None else 2]:
            if (y := run(args_of(case, x[:m], bias))) is None:
                continue
            assert y.shape == (m, case.n)
            assert y.dtype == dtype
            testing.assert_within(y, exact[:m], tolerance[:m], f"{op} on {kernel}, {case}, M={m}, bias {kind}")
    run.end()


@pytest.mark.parametrize("op", LINEAR_OPS)
@each_half
def test_half_precision_never_falls_back(op: str, dtype: torch.dtype) -> None:
    """Any N, K and M has a kernel, if this build has any of this op."""
    if on_device.kernels(op) == ["reference"]:
        pytest.skip(f"no kernel of {op} runs here but the reference")
    for case in (case for case in cases(op) if case.value_dtype != torch.float32):
        for m in MS[1:]:
            args = args_of(case, torch.zeros(m, case.k, dtype=dtype, device=on_device.DEVICE))
            assert OPS[op].pick(*args).name != "reference", f"{case}, M={m}:\n{OPS[op].why(*args)}"


@each_kernel(*LINEAR_OPS)
@each_half
@pytest.mark.usefixtures("poisoned")
def test_every_number_of_rows(op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    run = Runner(op, kernel)
    for case in few_cases(op):
        x = rows(140, case.k, generator, dtype)
        exact, tolerance = exact_and_tolerance(case, x, None)
        for m in range(1, len(x) + 1):
            if (y := run(args_of(case, x[:m]))) is None:
                continue
            testing.assert_within(y, exact[:m], tolerance[:m], f"{op} on {kernel}, {case}, M={m}")
    run.end()


@each_kernel(*LINEAR_OPS)
@each_half
def test_layouts(op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Any rank and strides, and x that starts at any element."""
    run = Runner(op, kernel)
    for case in few_cases(op):
        for label, host in inputs(case.k, generator).items():
            # A view of the same strides on the device.
            base = torch.empty(host.untyped_storage().nbytes() // host.itemsize)
            base.set_(host.untyped_storage(), 0, base.shape)
            x = base.to(dtype).to(on_device.DEVICE).as_strided(host.shape, host.stride(), host.storage_offset())
            flat = x.reshape(-1, case.k)
            if (y := run(args_of(case, x))) is None:
                continue
            assert y.shape == (*x.shape[:-1], case.n)
            assert_right(case, flat, None, y.reshape(-1, case.n), f"{op} on {kernel}, {case}, x {label}")
        for offset in (1, 2, 3, 5, 8):
            for m in FEW_MS:
                wide = rows(1, m * case.k + offset, generator, dtype).flatten()
                x = wide[offset:].view(m, case.k)
                if (y := run(args_of(case, x))) is None:
                    continue
                assert_right(case, x, None, y, f"{op} on {kernel}, {case}, M={m}, x from element {offset}")
    run.end()


@each_kernel(*LINEAR_OPS)
@each_half
def test_neighbours_of_x_do_not_matter(op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """x lies in NaNs: a read beyond it that is multiplied by zero still shows."""
    run = Runner(op, kernel)
    for case in few_cases(op):
        for m in FEW_MS:
            wide = torch.full((m * case.k + 8192,), torch.nan, dtype=dtype, device=on_device.DEVICE)
            x = wide[4096 : 4096 + m * case.k].view(m, case.k)
            x.copy_(rows(m, case.k, generator, dtype))
            if (y := run(args_of(case, x))) is None:
                continue
            assert_right(case, x, None, y, f"{op} on {kernel}, {case}, M={m}")
    run.end()


@each_kernel(*LINEAR_OPS)
@each_half
def test_weights_at_any_address(op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Weight tensors that start one element into a buffer of NaNs and ones: right, or an error that says why."""
    for case in few_cases(op):
        x = rows(3, case.k, generator, dtype)
        args = list(args_of(case, x))
        for at, arg in enumerate(args[1:], 1):
            if isinstance(arg, Tensor):
                fill = torch.nan if arg.is_floating_point() else -1
                wide = torch.full((arg.numel() + 65,), fill, dtype=arg.dtype, device=arg.device)
                args[at] = wide[1 : 1 + arg.numel()].view(arg.shape).copy_(arg)
        y, error = result_or_error(op, kernel, tuple(args))
        assert error is None or error.startswith(f"{op}: ")
        if y is not None:
            assert_right(case, x, None, y, f"{op} on {kernel}, {case}")


@each_kernel(*LINEAR_OPS)
@each_half
def test_nothing_around_the_result_is_written(
    op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Results get the holes between blocks of a known value, which has to stay."""
    run, inside, asked = Runner(op, kernel), 0, 0
    for case in few_cases(op):
        for m in FEW_MS:
            args = args_of(case, rows(m, case.k, generator, dtype), bias_of(case, generator, dtype))
            if run(args) is None:  # whatever is made once is made now
                continue
            size = -(-m * case.n * dtype.itemsize // 512) * 512
            blocks = [torch.full((size,), 0x5A, dtype=torch.uint8, device=on_device.DEVICE) for _ in range(40)]
            holes = {block.data_ptr() for block in blocks[1::2]}
            del blocks[1::2]
            y = run(args)
            inside, asked = inside + (y.data_ptr() in holes), asked + 1
            assert all(bool((block == 0x5A).all()) for block in blocks), f"{op} on {kernel}, {case}, M={m}"
    run.end()
    if on_device.DEVICE == "cuda":
        assert inside, f"none of {asked} results lay between the blocks: nothing was tested"


@each_kernel(*LINEAR_OPS)
@each_half
def test_runs_agree_whatever_memory_held(op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Bit by bit, with free memory full of NaNs, of zeros, and of ones."""
    run = Runner(op, kernel)
    for case in few_cases(op):
        for m in (*FEW_MS, 257):
            args = args_of(case, rows(m, case.k, generator, dtype), bias_of(case, generator))
            if (first := run(args)) is None:
                continue
            for fill in (torch.nan, 0.0, 1.0):
                free = [torch.full((at,), fill, device=on_device.DEVICE) for at in (256, 4096, 65536, 1 << 20, 1 << 22)]
                del free
                assert torch.equal(first, run(args)), f"{op} on {kernel}, {case}, M={m}, memory of {fill}"
    run.end()


@each_kernel(*LINEAR_OPS)
@each_half
def test_a_nan_stays_in_its_row(op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    run = Runner(op, kernel)
    for case in few_cases(op):
        for m in (2, 17, 65, 130):
            x = rows(m, case.k, generator, dtype)
            x[m // 2] = torch.nan
            if (y := run(args_of(case, x))) is None:
                continue
            others = torch.arange(m, device=x.device) != m // 2
            assert y[others].isfinite().all(), f"{case}: row {m // 2} of x reached other rows"
            if op != "bitmask_linear":
                assert y[m // 2].isnan().all(), f"{case}: a NaN in x is missing from y"
    run.end()


@each_kernel("int8_dynamic_linear", "int4_linear")
@each_dtype
def test_quantized_activations_at_the_edges(
    op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Rows of zeros, of one value, of large and tiny magnitudes, and ties of the rounding."""
    run = Runner(op, kernel)
    extra = ("int8",) if op == "int4_linear" else ()
    for case in (case for case in cases(op) if case.extra == extra and (case.n, case.k) in ((33, 75), (64, 576))):
        x = rows(6, case.k, generator)
        large, tiny = (3e4, 1e-3) if dtype == torch.float16 else (1e30, 1e-30)
        x[0], x[1], x[2] = 0.0, -3.25, tiny
        x[3] = torch.where(torch.arange(case.k, device=x.device) % 2 == 0, large, -large)
        x[4] = torch.arange(case.k, device=x.device) % 128 - 63.5
        x[4, 0] = 127.0
        if dtype == torch.float16:
            x[3] /= case.k  # so that the result is finite
        x = x.to(dtype)
        if (y := run(args_of(case, x))) is None:
            continue
        assert_right(case, x, None, y, f"{op} on {kernel}, {case}")
    run.end()


@each_kernel(*LINEAR_OPS)
def test_inputs_are_not_changed(op: str, kernel: str, generator: torch.Generator) -> None:
    run = Runner(op, kernel)
    for case in few_cases(op):
        args = args_of(case, rows(9, case.k, generator, torch.bfloat16), bias_of(case, generator))
        before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        run(args)
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor))
    run.end()


@only_cuda
@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize("m", [16, 17, 33, 129])
def test_kernels_agree(op: str, m: int, generator: torch.Generator) -> None:
    """What changes with M or the machine's choice is the order of sums, not the values."""
    for case in few_cases(op):
        x = rows(m, case.k, generator, torch.bfloat16)
        exact, tolerance = exact_and_tolerance(case, x, None)
        taken = [kernel for kernel in on_device.kernels(op) if not refusal(op, kernel, args_of(case, x))]
        results = {kernel: call(op, kernel, args_of(case, x)) for kernel in taken}
        for one, y in results.items():
            for other, z in results.items():
                testing.assert_within(y, z.double(), 2 * tolerance, f"{one} beside {other}, {case}")
        assert exact.shape == (m, case.n)


@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_runs_unforced_is_right(op: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    for case in cases(op):
        x, bias = rows(max(MS), case.k, generator, dtype), bias_of(case, generator, dtype)
        exact, tolerance = exact_and_tolerance(case, x, bias)
        for m in MS:
            y = OPS[op](*args_of(case, x[:m], bias))
            testing.assert_within(y, exact[:m], tolerance[:m], f"{op} unforced, {case}, M={m}")
    weight_args.cache_clear()  # the largest weights of the tests
