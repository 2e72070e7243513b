"""How the ops behave as a program's part: graphs, streams, torch.compile, gradients, modules, bad input."""

from __future__ import annotations

import on_device
import pytest
import torch
from on_device import (
    FEW_MS,
    LINEAR_OPS,
    Runner,
    args_of,
    assert_right,
    bias_of,
    call,
    each_half,
    each_kernel,
    few_cases,
    only_cuda,
    refusal,
    result_or_error,
    rows,
    taken_m,
)
from torch import Tensor

import llmkern
from llmkern import formats, testing
from llmkern._registry import OPS
from llmkern.nn import PackedLinear

BF16 = torch.bfloat16
BUSY_CYCLES = 400_000_000  # of a stream: a few tenths of a second


@pytest.mark.parametrize("op", LINEAR_OPS)
@each_half
def test_opcheck(op: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    case = few_cases(op)[0]
    for x in (rows(5, case.k, generator, dtype), rows(case.k, 3, generator, dtype).T):
        torch.library.opcheck(OPS[op].op, args_of(case, x, bias_of(case, generator, dtype)))
    x = rows(4, case.k, generator, dtype).requires_grad_()
    torch.library.opcheck(OPS[op].op, args_of(case, x))


@only_cuda
@each_kernel(*LINEAR_OPS)
@each_half
def test_graphs_replay_with_changed_inputs(
    op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Captured once, replayed on other inputs: the very bits of a call, whatever the memory held before."""
    if kernel == "reference":
        pytest.skip("the reference promises no capture")
    run = Runner(op, kernel)
    for case in few_cases(op):
        for m in FEW_MS:
            x, bias = rows(m, case.k, generator, dtype), bias_of(case, generator)
            args = args_of(case, x, bias)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                taken = run(args) is not None
            torch.cuda.current_stream().wait_stream(side)
            if not taken:
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                first = call(op, kernel, args)
                second = call(op, kernel, args_of(case, x * 2, bias))
            for _ in range(3):
                x.copy_(rows(m, case.k, generator, dtype))
                bias.copy_(bias_of(case, generator))
                first.fill_(torch.nan)
                second.fill_(torch.nan)
                graph.replay()
                assert torch.equal(first, call(op, kernel, args)), f"{op} on {kernel}, {case}, M={m}"
                assert torch.equal(second, call(op, kernel, args_of(case, x * 2, bias)))
    run.end()


@only_cuda
@each_kernel(*LINEAR_OPS)
def test_the_current_stream_is_used(op: str, kernel: str, generator: torch.Generator) -> None:
    """While the default stream is busy, a call on another one is done; and it waits for what that one does before."""
    case, run = few_cases(op)[1], Runner(op, kernel)
    for m in (1, 65):
        x = rows(m, case.k, generator, BF16)
        args = args_of(case, x)
        if (wanted := run(args)) is None:
            continue
        late = torch.full_like(x, torch.nan)
        args_late = args_of(case, late)
        torch.cuda.synchronize()
        stream, done = torch.cuda.Stream(), torch.cuda.Event()
        torch.cuda._sleep(BUSY_CYCLES)
        busy = torch.cuda.Event()
        busy.record()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY_CYCLES // 40)
            late.copy_(x)
            got = call(op, kernel, args_late)
            done.record()
        done.synchronize()
        if kernel != "reference":  # which may wait for the device
            assert not busy.query(), "the call waited for the default stream"
        torch.cuda.synchronize()
        assert torch.equal(got, wanted), f"{op} on {kernel}, {case}, M={m}"
    run.end()


@only_cuda
@each_kernel(*LINEAR_OPS)
def test_two_streams_at_once(op: str, kernel: str, generator: torch.Generator) -> None:
    """No call shares what another writes: as many calls on two streams as on one, with the same bits."""
    case = few_cases(op)[1]
    inputs = [rows(m, case.k, generator, BF16) for m in (17, 1, 65, 3) for _ in range(2)]
    inputs = [x for x in inputs if not refusal(op, kernel, args_of(case, x))]
    wanted = [call(op, kernel, args_of(case, x)) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        got: list[Tensor] = []
        for at, x in enumerate(inputs):
            with torch.cuda.stream(streams[at % 2]):
                got.append(call(op, kernel, args_of(case, x)))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), f"{op} on {kernel}"


@only_cuda
@each_kernel(*LINEAR_OPS)
def test_calls_do_not_wait(op: str, kernel: str, generator: torch.Generator) -> None:
    """No hidden synchronization: the call returns while the stream is busy."""
    if kernel == "reference":
        pytest.skip("the reference may wait for the device")
    case = few_cases(op)[1]
    args = args_of(case, rows(taken_m(op, kernel), case.k, generator, BF16), bias_of(case, generator))
    call(op, kernel, args)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    for _ in range(3):
        call(op, kernel, args)
    waited = busy.query()
    torch.cuda.synchronize()
    assert not waited


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_compile(op: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    case = few_cases(op)[0]
    w = case.weight().to(on_device.DEVICE)

    def model(x: Tensor) -> Tensor:
        return getattr(llmkern.ops, op)(x * 2, w).relu()

    backend = "inductor" if on_device.DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for m in (1, 5):
        x = rows(m, case.k, generator, BF16)
        torch.testing.assert_close(compiled(x), model(x))


@each_kernel(*LINEAR_OPS)
@each_half
def test_gradients(op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    case = few_cases(op)[1]
    m = taken_m(op, kernel)
    x, bias = rows(m, case.k, generator, dtype), bias_of(case, generator, dtype)
    x.requires_grad_()
    bias.requires_grad_()
    dy = rows(m, case.n, generator, dtype)
    call(op, kernel, args_of(case, x, bias)).backward(dy)
    columns = on_device.dense(case).T
    tolerance = testing.product_tolerance(dy, columns, None)
    testing.assert_within(x.grad, testing.exact_product(dy, columns, None), tolerance, f"{op}: dx")
    testing.assert_within(
        bias.grad, dy.double().sum(0), 3 * torch.finfo(dtype).eps * dy.double().abs().sum(0), f"{op}: db"
    )


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_weights_survive_the_way_there_and_back(op: str) -> None:
    for case in on_device.cases(op):
        there = case.weight().to(on_device.DEVICE)
        assert there.device.type == on_device.DEVICE
        back = there.to("cpu").tensors()
        for name, tensor in case.weight().tensors().items():
            assert torch.equal(back[name], tensor), f"{case}: {name}"
        assert torch.equal(there.unpack().cpu(), case.weight().unpack())


def test_packing_there_is_packing_here(generator: torch.Generator) -> None:
    dense = torch.randn((37, 136), generator=generator)
    quads = dense.view(37, -1, 4)
    sparse = (quads * (quads.abs().argsort(-1).argsort(-1) >= 2)).view(37, 136)
    packs = {
        "int8": lambda w, s: formats.Int8Weight.pack(w, group_size=64),
        "int4": lambda w, s: formats.Int4Weight.pack(w, group_size=32),
        "sparse24": lambda w, s: formats.Sparse24Weight.pack(s, dtype=BF16),
        "sparse24_int4": lambda w, s: formats.Sparse24Int4Weight.pack(s, group_size=64),
        "bitmask": lambda w, s: formats.BitmaskWeight.pack(s, dtype=BF16),
    }
    for name, pack in packs.items():
        here, there = pack(dense, sparse), pack(dense.to(on_device.DEVICE), sparse.to(on_device.DEVICE))
        assert there.device.type == on_device.DEVICE
        for label, tensor in here.tensors().items():
            assert torch.equal(there.tensors()[label].cpu(), tensor), f"{name}: {label}"


@pytest.mark.parametrize("op", [op for op in LINEAR_OPS if op != "int8_dynamic_linear"])
def test_modules_move(op: str, generator: torch.Generator) -> None:
    case = few_cases(op)[0]
    module = PackedLinear(case.weight()).to(on_device.DEVICE)
    x = rows(3, case.k, generator, BF16)
    assert_right(case, x, None, module(x), f"{op} in a module")


@only_cuda
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bad_input_of_mixed_devices(op: str, generator: torch.Generator) -> None:
    case = few_cases(op)[0]
    x, bias = rows(3, case.k, generator, BF16), bias_of(case, generator)
    args = args_of(case, x, bias)
    for at, arg in enumerate(args):
        if isinstance(arg, Tensor):
            with pytest.raises(ValueError, match=rf"^{op}: .*cpu") as raised:
                OPS[op](*args[:at], arg.cpu(), *args[at + 1 :])
            assert "\n" not in str(raised.value)
    torch.cuda.synchronize()


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bad_input_of_shape_and_dtype(op: str, generator: torch.Generator) -> None:
    case = few_cases(op)[0]
    args = args_of(case, rows(3, case.k, generator, BF16), bias_of(case, generator))
    at = on_device.bias_at(op) + 1
    bad = {
        "x too wide": (0, torch.ones(3, case.k + 8, device=on_device.DEVICE), ValueError),
        "x too narrow": (0, torch.ones(3, case.k - 8, device=on_device.DEVICE), ValueError),
        "x double": (0, args[0].double(), TypeError),
        "x integers": (0, args[0].int(), TypeError),
        "bias too long": (at, torch.ones(case.n + 1, device=on_device.DEVICE), ValueError),
        "bias double": (at, args[at].double(), TypeError),
    }
    for what, (place, value, error) in bad.items():
        with pytest.raises(error, match=f"^{op}: "):
            OPS[op](*args[:place], value, *args[place + 1 :])
        assert what
    if on_device.DEVICE == "cuda":
        torch.cuda.synchronize()
    assert_right(case, args[0], args[at], OPS[op](*args), f"{op} after bad calls")


@only_cuda
@each_kernel(*LINEAR_OPS)
def test_bad_input_beyond_two_to_the_31(op: str, kernel: str) -> None:
    """More elements of y than an int32 counts: a right result up to the last one, or an error before anything runs."""
    if kernel == "reference":
        pytest.skip("torch's own product")
    n, k = 4099, 8
    m = 2**31 // n + 17
    if torch.cuda.mem_get_info()[0] < 3 * m * n * 2:
        pytest.skip("needs 13 GB of free memory")
    case = on_device.LinearCase(op, n, k)
    x = torch.ones(m, k, dtype=BF16, device="cuda")
    y, error = result_or_error(op, kernel, args_of(case, x))
    torch.cuda.synchronize()
    if y is None:
        assert error.startswith(f"{op}: ")
        return
    for at in (0, m // 2, m - 1):
        assert_right(case, x[at : at + 1], None, y[at : at + 1], f"{op} on {kernel}, row {at} of {m}")
    del y
    torch.cuda.empty_cache()
