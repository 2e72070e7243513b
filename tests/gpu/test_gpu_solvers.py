"""The solvers' blocks on the device against float64: the same codes but for ties, a loss within 0.1 %."""

from __future__ import annotations

import on_device
import pytest
import torch
from cases import GPTQ_CASES, SEARCH_CASES, SPARSEGPT_CASES, BlockCase, SearchCase
from on_device import each_kernel, moved, only_cuda, result_or_error
from torch import Tensor

import llmkern
from llmkern import solvers
from llmkern._registry import OPS
from llmkern.ops.gptq_block.reference import quantize
from llmkern.ops.gptq_block.reference import reference as gptq_reference
from llmkern.ops.sparsegpt_block.reference import reference as sparsegpt_reference

TIE = 1e-3  # of a step: a value so close to the middle may take either code
LOSS = 1e-3  # relative
BLOCKS = ("gptq_block", "sparsegpt_block")
LARGE = (BlockCase(1000, 128, compensated=True), BlockCase(257, 128, group_size=32, symmetric=False))
LARGE_SPARSE = (
    BlockCase(1000, 128, bits=0, prune=(2, 4), compensated=True), BlockCase(257, 128, bits=4, prune=(2, 4)),
    BlockCase(257, 128, bits=0, mask=0.5),
)  # fmt: skip


def blocks(op: str) -> tuple[BlockCase, ...]:
    return (*GPTQ_CASES, *LARGE) if op == "gptq_block" else (*SPARSEGPT_CASES, *LARGE_SPARSE)


def block_args(op: str, case: BlockCase, generator: torch.Generator) -> tuple:
    """The op's arguments, on the CPU."""
    t = case.tensors(generator)
    if op == "gptq_block":
        return (t["w"], t["wc"], t["v"], t["scales"], t["zeros"], t["groups"], t["mask"], case.bits)
    grid = (t["scales"], t["zeros"], t["groups"])
    return (t["w"], t["wc"], t["v"], t["diagonal"], t["mask"], *case.prune, *grid, case.bits)


def double(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def before_rounding(w: Tensor, wc: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """The compensated values [N, B], float64, of columns chosen as q."""
    return wc.double() + (w.double() - q.double()) @ v.double().triu(1)


def loss(args: tuple, diagonal: Tensor, q: Tensor) -> float:
    w, wc, v = args[:3]
    return float(((before_rounding(w, wc, v, q) - q.double()) * diagonal.double()).square().sum())


def assert_only_ties_differ(args: tuple, case: BlockCase, grid: tuple, q: Tensor, wanted: Tensor) -> None:
    """Where a row leaves the reference, it does so at a value that lies in the middle of two codes."""
    scales, zeros, groups = grid
    differs = ~torch.isclose(q.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    values = before_rounding(*args[:3], wanted)
    for row in differs.any(1).nonzero().flatten().tolist():
        first = int(differs[row].nonzero()[0])
        group = int(groups[first])
        step = values[row, first] / scales[row, group].double() + (0 if zeros is None else int(zeros[row, group]))
        distance = abs(float(step - step.floor()) - 0.5)
        assert distance < TIE, f"{case}: row {row}, column {first}: {float(step)} is no tie"


@each_kernel("gptq_block")
@pytest.mark.parametrize("case", blocks("gptq_block"), ids=str)
@pytest.mark.usefixtures("poisoned")
def test_gptq_block(op: str, kernel: str, case: BlockCase, generator: torch.Generator) -> None:
    args = block_args(op, case, generator)
    diagonal = torch.linspace(0.5, 2, case.b)
    wanted = gptq_reference(*double(args))
    got = on_device.call(op, kernel, moved(args)).cpu()
    assert got.dtype == torch.float32
    assert_only_ties_differ(args, case, args[3:6], got, wanted)
    if args[6] is not None:
        assert not got[~args[6]].any()
    assert loss(args, diagonal, got) <= loss(args, diagonal, wanted) * (1 + LOSS) + 1e-9


@each_kernel("sparsegpt_block")
@pytest.mark.parametrize("case", blocks("sparsegpt_block"), ids=str)
@pytest.mark.usefixtures("poisoned")
def test_sparsegpt_block(op: str, kernel: str, case: BlockCase, generator: torch.Generator) -> None:
    args = block_args(op, case, generator)
    diagonal, mask = args[3], args[4]
    wanted, wanted_kept = sparsegpt_reference(*double(args))
    got, kept = (one.cpu() for one in on_device.call(op, kernel, moved(args)))
    assert got.dtype == torch.float32
    assert kept.dtype == torch.bool
    assert not got[~kept].any()
    if mask is not None:
        assert torch.equal(kept, mask)
    else:
        prune_n, prune_m = case.prune
        assert (kept.view(case.n, case.b // prune_m, prune_m).sum(-1) == prune_m - prune_n).all()
        assert (kept == wanted_kept).all(1).float().mean() >= 0.99 if case.n else True
    if case.bits and mask is not None:
        assert_only_ties_differ(args, case, args[7:10], got, wanted)
    if not case.bits:
        same = (kept == wanted_kept).all(1)
        torch.testing.assert_close(got[same].double(), wanted[same], rtol=1e-4, atol=1e-5)
    assert loss(args, diagonal, got) <= loss(args, diagonal, wanted) * (1 + LOSS) + 1e-9


@each_kernel("scale_search")
@pytest.mark.parametrize("case", SEARCH_CASES, ids=str)
def test_scale_search(op: str, kernel: str, case: SearchCase, generator: torch.Generator) -> None:
    """As little error as the reference's choice."""
    w, importance = case.tensors(generator)
    rest = (case.group_size, case.bits, case.symmetric, case.steps, case.smallest)
    got = [one.cpu() for one in on_device.call(op, kernel, (*moved((w, importance)), *rest))]
    with llmkern.force("reference"):
        wanted = OPS[op](w, importance, *rest)
    errors = []
    for scales, zeros in (got, wanted):
        scale, zero = (one.repeat_interleave(case.group_size, 1)[:, : case.k] for one in (scales, zeros.float()))
        errors.append(((w - quantize(w, scale, zero, case.bits)).square() * importance).sum(1))
    assert (errors[0] <= errors[1] * (1 + LOSS) + 1e-9).all()


@each_kernel(*BLOCKS)
def test_two_runs_agree(op: str, kernel: str, generator: torch.Generator) -> None:
    """Bit by bit, whatever free memory held."""
    for case in blocks(op):
        args = moved(block_args(op, case, generator))
        results = []
        for fill in (torch.nan, 1.0):
            free = [torch.full((at,), fill, device=on_device.DEVICE) for at in (4096, 1 << 18, 1 << 21)]
            del free
            result = on_device.call(op, kernel, args)
            results.append((result,) if isinstance(result, Tensor) else result)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), case


@each_kernel(*BLOCKS)
@pytest.mark.usefixtures("poisoned")
def test_layers_are_as_calls(op: str, kernel: str, generator: torch.Generator) -> None:
    for case in blocks(op):
        each = [block_args(op, case, generator) for _ in range(3)]
        whole = tuple(
            torch.stack(x) if isinstance(x[0], Tensor) and x[0].dtype != torch.int32 else x[0]  # all but groups
            for x in zip(*each, strict=True)
        )
        found = on_device.call(op, kernel, moved(whole))
        wanted = [on_device.call(op, kernel, moved(args)) for args in each]
        for i, result in enumerate((found,) if isinstance(found, Tensor) else found):
            one_by_one = [one if isinstance(found, Tensor) else one[i] for one in wanted]
            assert torch.equal(result, torch.stack(one_by_one)), case


@only_cuda
@each_kernel(*BLOCKS)
def test_graphs(op: str, kernel: str, generator: torch.Generator) -> None:
    if kernel == "reference":
        pytest.skip("the reference reads groups on the host")
    case = blocks(op)[-2]
    args, other = (moved(block_args(op, case, generator)) for _ in range(2))
    on_device.call(op, kernel, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = on_device.call(op, kernel, args)
    for mine, fresh in zip(args, other, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(fresh)
    graph.replay()
    wanted = on_device.call(op, kernel, other)
    pairs = zip(*((one,) if isinstance(one, Tensor) else one for one in (got, wanted)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@only_cuda
@each_kernel(*BLOCKS)
def test_bad_input_of_mixed_devices(op: str, kernel: str, generator: torch.Generator) -> None:
    args = moved(block_args(op, blocks(op)[2], generator))
    for at, arg in enumerate(args):
        if isinstance(arg, Tensor):
            result, error = result_or_error(op, kernel, (*args[:at], arg.cpu(), *args[at + 1 :]))
            torch.cuda.synchronize()
            if kernel != "reference":
                assert result is None, f"argument {at} on the CPU was taken"
                assert error.startswith(f"{op}: ")


def layer(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight [160, 256] and a Hessian of inputs whose columns have something in common."""
    inputs = torch.randn((1024, 256), generator=generator)
    inputs += 0.5 * inputs[:, :1] + 0.2 * inputs.roll(1, 1)
    return torch.randn((160, 256), generator=generator), inputs.T @ inputs


SOLVERS = {
    "gptq": lambda w, h: solvers.gptq(w, h, group_size=64),
    "gptq as published": lambda w, h: solvers.gptq(w, h, group_size=64, act_order=None, clip=None),
    "sparsegpt 2:4": lambda w, h: solvers.sparsegpt(w, h, sparsity="2:4"),
    "sparsegpt 2:4 as published": lambda w, h: solvers.sparsegpt(w, h, sparsity="2:4", refit=False),
    "sparsegpt 0.5": lambda w, h: solvers.sparsegpt(w, h, sparsity=0.5),
    "sparsegpt 2:4 int4": lambda w, h: solvers.sparsegpt(w, h, sparsity="2:4", bits=4, group_size=64),
    "wanda 2:4": lambda w, h: solvers.wanda(w, h, sparsity="2:4"),
    "rtn": lambda w, h: solvers.rtn(w),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_layer_loses_what_it_loses_on_the_cpu(name: str, generator: torch.Generator) -> None:
    w, h = layer(generator)
    here, there = SOLVERS[name](w, h), SOLVERS[name](*moved((w, h)))
    assert there.weight.device.type == on_device.DEVICE
    assert float(there.loss) == pytest.approx(float(here.loss), rel=5 * LOSS) if here.loss is not None else True
