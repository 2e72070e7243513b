"""gptq_block, sparsegpt_block and scale_search: every kernel against the rules themselves, in float64.

The columns depend on each other, so one value that rounds the other way changes all after it. Each column is therefore
judged given the kernel's own columns before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, BlockCase, SearchCase
from torch import Tensor

import llmkern
from llmkern._registry import OPS
from llmkern.ops.gptq_block.reference import reference as gptq_reference
from llmkern.ops.sparsegpt_block.reference import optimal_values

TIE = 1e-5  # a rounding may go either way this close to a tie, in steps of the grid; a choice by score, relatively


def compensated(t: dict[str, Tensor], q: Tensor) -> Tensor:
    """float64 [N, B]: each column's value given the chosen q of those before it."""
    moved = (t["w"].double() - q.double()) @ t["v"].double().triu(1)
    return t["wc"].double() + moved


def assert_nearest(t: dict[str, Tensor], q: Tensor, bits: int, keep: Tensor, wc: Tensor) -> None:
    """Kept q are the grid's nearest values to wc."""
    at = t["groups"].long()
    scale = t["scales"].double()[:, at]
    zero = 0 if t["zeros"] is None else t["zeros"].double()[:, at]
    code = q.double() / scale + zero
    integer = code.round()
    assert ((code - integer).abs() < 1e-4)[keep].all(), "a value that is not on the grid"
    assert ((integer >= -(2 ** (bits - 1))) & (integer <= 2 ** (bits - 1) - 1))[keep].all(), "a code out of range"
    wanted = (wc / scale + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    off = (wanted - integer).abs()
    noise = TIE + 1e-6 * wc.abs() / scale
    assert (off <= 0.5 + noise)[keep].all(), f"not the nearest code: {float(off[keep].max())} steps away"


def run(op: str, row: str, t: dict[str, Tensor], *rest: object) -> object:
    with llmkern.force(row):
        return OPS[op](*t.values(), *rest)


@pytest.mark.of_ops("gptq_block")
@pytest.mark.usefixtures("poisoned")
def test_gptq_block(op: str, row: str, case: BlockCase, generator: torch.Generator) -> None:
    t = case.tensors(generator)
    del t["diagonal"]
    before = {name: tensor.clone() for name, tensor in t.items() if tensor is not None}
    assert_gptq_block(case, t, run(op, row, t, case.bits))
    assert all(torch.equal(t[name], tensor) for name, tensor in before.items()), "an input was changed"


def assert_gptq_block(case: BlockCase, t: dict[str, Tensor], q: Tensor) -> None:
    """The values q of a case are by the rules."""
    assert q.dtype == torch.float32
    assert q.shape == (case.n, case.b)
    keep = torch.ones_like(q, dtype=torch.bool) if t["mask"] is None else t["mask"]
    assert (q[~keep] == 0).all()
    assert_nearest(t, q, case.bits, keep, compensated(t, q))


@pytest.mark.of_ops("sparsegpt_block")
@pytest.mark.usefixtures("poisoned")
def test_sparsegpt_block(op: str, row: str, case: BlockCase, generator: torch.Generator) -> None:
    t = case.tensors(generator)
    args = (t["w"], t["wc"], t["v"], t["diagonal"], t["mask"], *case.prune, t["scales"], t["zeros"], t["groups"])
    with llmkern.force(row):
        q, keep = OPS[op](*args, case.bits)
    assert_sparsegpt_block(case, t, q, keep)


def assert_sparsegpt_block(case: BlockCase, t: dict[str, Tensor], q: Tensor, keep: Tensor) -> None:
    """The values q and the mask of a case are by the rules."""
    assert keep.dtype == torch.bool
    assert q.shape == keep.shape == (case.n, case.b)
    assert (q[~keep] == 0).all()
    wc = compensated(t, q)
    if case.bits:
        assert_nearest(t, q, case.bits, keep, wc)
    else:
        torch.testing.assert_close(q[keep].double(), wc[keep], rtol=1e-5, atol=1e-5)
    if t["mask"] is not None:
        assert torch.equal(keep, t["mask"])
        return
    prune_n, prune_m = case.prune
    for start in range(0, case.b, prune_m):
        at = slice(start, start + prune_m)
        assert ((~keep[:, at]).sum(1) == prune_n).all()
        fixed = t["wc"].double()[:, at] + (t["w"].double() - q.double())[:, :start] @ t["v"].double()[:start, at]
        value = optimal_values(t["w"].double()[:, at], fixed, t["v"].double()[at, at])
        score = (value * t["diagonal"].double()[at]).abs()
        worst_kept = score.masked_fill(~keep[:, at], torch.inf).amin(1)
        best_pruned = score.masked_fill(keep[:, at], 0).amax(1)
        assert (best_pruned <= worst_kept * (1 + TIE) + TIE).all(), f"columns {at}: the wrong ones were pruned"


def block_args(op: str, case: BlockCase, t: dict[str, Tensor]) -> tuple[Any, ...]:
    """The op's arguments, of one layer or several."""
    grid = (t["scales"], t["zeros"], t["groups"])
    if op == "gptq_block":
        return (t["w"], t["wc"], t["v"], *grid, t["mask"], case.bits)
    return (t["w"], t["wc"], t["v"], t["diagonal"], t["mask"], *case.prune, *grid, case.bits)


def layers(case: BlockCase, count: int, generator: torch.Generator) -> tuple[list[dict], dict[str, Tensor]]:
    """Tensors of layers of one shape: of each, and of all in one."""
    each = [case.tensors(generator) for _ in range(count)]
    return each, {
        name: x if x is None or name == "groups" else torch.stack([t[name] for t in each])
        for name, x in each[0].items()
    }


def assert_layers_are_calls(
    op: str, call: Callable[..., Any], case: BlockCase, count: int, generator: torch.Generator
) -> None:
    """A call for all layers gives exactly what a call per layer gives, and leaves its arguments as they are."""
    each, whole = layers(case, count, generator)
    before = {name: x.clone() for name, x in whole.items() if x is not None}
    found = call(*block_args(op, case, whole))
    wanted = [call(*block_args(op, case, t)) for t in each]
    for i, result in enumerate((found,) if op == "gptq_block" else found):
        stacked = torch.stack([one if op == "gptq_block" else one[i] for one in wanted])
        assert result.shape == (count, case.n, case.b)
        assert result.is_contiguous()
        assert torch.equal(result, stacked), f"result {i} of layers {(result != stacked).flatten(1).any(1).tolist()}"
    assert all(torch.equal(whole[name], x) for name, x in before.items()), "an input was changed"


@pytest.mark.of_ops("gptq_block", "sparsegpt_block")
@pytest.mark.usefixtures("poisoned")
def test_layers_are_as_calls(op: str, row: str, case: BlockCase, generator: torch.Generator) -> None:
    with llmkern.force(row):
        for count in (1, 3):
            assert_layers_are_calls(op, OPS[op], case, count, generator)


@pytest.mark.of_ops("sparsegpt_block")
def test_equal_scores_prune_the_first(op: str, row: str) -> None:
    w = torch.ones(5, 8)
    eye, ones = torch.eye(8), torch.ones(8)
    with llmkern.force(row):
        q, keep = OPS[op](w, w, eye, ones, None, 2, 4, None, None, None, 0)
    assert torch.equal(keep, torch.tensor([False, False, True, True] * 2).expand(5, 8))
    assert torch.equal(q, keep.float())


@pytest.mark.of_ops("gptq_block")
def test_rounding_ties_go_to_even_codes(op: str, row: str) -> None:
    w = torch.arange(-40, 41).float().div(4)[None].contiguous()  # halves and quarters, beyond the ends of the grid
    b = w.shape[1]
    scales, groups = torch.full((1, 1), 0.5), torch.zeros(b, dtype=torch.int32)
    with llmkern.force(row):
        q = OPS[op](w, w, torch.eye(b), scales, None, groups, None, 4)
    assert torch.equal(q, torch.round(w / 0.5).clamp(-8, 7) * 0.5)


def test_gptq_block_is_gptq(generator: torch.Generator) -> None:
    """The reference's column rule in float64 is the classical update with the Cholesky factor of the inverse."""
    case = BlockCase(17, 64, group_size=16, symmetric=False)
    t = case.tensors(generator)
    v = t["v"].double() * t["diagonal"].double()
    inverse = torch.linalg.cholesky(torch.linalg.inv(v @ v.T), upper=True)
    wide = {name: None if x is None else x.double() if x.is_floating_point() else x for name, x in t.items()}
    unit = v / v.diagonal()
    q = gptq_reference(wide["w"], wide["w"], unit, wide["scales"], wide["zeros"], wide["groups"], None, 4)

    left = wide["w"].clone()
    for j in range(case.b):
        scale, zero = wide["scales"][:, j // 16], wide["zeros"][:, j // 16].double()
        chosen = ((left[:, j] / scale).round() + zero).clamp(-8, 7).sub(zero).mul(scale)
        torch.testing.assert_close(q[:, j], chosen)
        left[:, j + 1 :] -= ((left[:, j] - chosen) / inverse[j, j])[:, None] * inverse[j, j + 1 :]


@pytest.mark.of_ops("scale_search")
@pytest.mark.usefixtures("poisoned")
def test_scale_search(op: str, row: str, case: SearchCase, generator: torch.Generator) -> None:
    w, importance = case.tensors(generator)
    with llmkern.force(row):
        scales, zeros = OPS[op](
            w, importance, case.group_size, case.bits, case.symmetric, case.steps, case.smallest
        )  # fmt: skip
    assert_scale_search(case, w, importance, scales, zeros)


def assert_scale_search(case: SearchCase, w: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor) -> None:
    """The scales and zeros of a case are the best of the candidates."""
    n_groups = -(-case.k // case.group_size)
    assert scales.shape == zeros.shape == (case.n, n_groups)
    assert (scales.dtype, zeros.dtype) == (torch.float32, torch.int8)
    levels, half = 2**case.bits - 1, 2 ** (case.bits - 1)
    for g in range(n_groups):
        at = slice(g * case.group_size, (g + 1) * case.group_size)
        part, weight = w[:, at].double(), importance[at].double()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if case.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        ratios = 1 - torch.arange(case.steps).double() * (1 - case.smallest) / case.steps
        candidates = (high - low)[:, None] * ratios / levels
        candidates[(high - low) == 0] = 1.0

        def error(scale: Tensor, zero: Tensor, part: Tensor = part, weight: Tensor = weight) -> Tensor:
            code = ((part / scale[:, None]).round() + zero[:, None]).clamp(-half, half - 1)
            return ((((code - zero[:, None]) * scale[:, None]) - part) ** 2 * weight).sum(1)

        def zero_of(scale: Tensor, ratio: Tensor, low: Tensor = low) -> Tensor:
            return torch.zeros_like(scale) if case.symmetric else (-low * ratio / scale).round() - half

        errors = torch.stack([error(c, zero_of(c, r)) for c, r in zip(candidates.T, ratios, strict=True)], dim=1)
        mine = scales[:, g].double()
        assert ((candidates - mine[:, None]).abs().amin(1) <= 1e-6 * mine).all(), "a scale that is no candidate"
        mine_error = error(mine, zeros[:, g].double())
        # fp32 rounding of a value near a tie changes an error a little; it must not lose more than that.
        assert (mine_error <= errors.amin(1) * (1 + 1e-4) + 1e-10).all(), "not the best candidate"
        if case.symmetric:
            assert (zeros[:, g] == 0).all()
        assert (scales[:, g][part.abs().amax(1) == 0] == 1.0).all()


def bad(op: str, args: list, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{op}: .*{words}") as raised:
        OPS[op](*args)
    assert "\n" not in str(raised.value)


def replaced(args: list, at: int, value: object) -> list:
    return [*args[:at], value, *args[at + 1 :]]


def test_gptq_block_refuses(generator: torch.Generator) -> None:
    t = CASES["gptq_block"][4].tensors(generator)
    del t["diagonal"]
    args = [*t.values(), 3]
    for at, name in enumerate(("w", "wc", "v")):
        bad(
            "gptq_block", replaced(args, at, args[at].double()), TypeError, f"{name} must be float32, got torch.float64"
        )
        bad("gptq_block", replaced(args, at, args[at].T.contiguous().T), ValueError, f"{name} must be a contiguous")
        if at:
            bad("gptq_block", replaced(args, at, args[at].to("meta")), ValueError, f"{name} is on meta")
    for at, name in ((3, "scales"), (4, "zeros"), (5, "groups"), (6, "mask")):
        there = torch.ones(17, 128, dtype=torch.bool) if name == "mask" else args[at]
        bad("gptq_block", replaced(args, at, there.to("meta")), ValueError, f"{name} is on meta, but w is on cpu")
    bad("gptq_block", replaced(args, 1, args[1][:, :-1].contiguous()), ValueError, r"w is \[N=17, B=128\]")
    bad("gptq_block", replaced(args, 3, args[3][:-1]), ValueError, r"scales must be .*\[N=17, G\]")
    bad("gptq_block", replaced(args, 4, args[4].int()), ValueError, "zeros must be contiguous int8")
    bad("gptq_block", replaced(args, 5, args[5].long()), ValueError, r"groups must be contiguous int32 \[B=128\]")
    bad("gptq_block", replaced(args, 6, torch.ones(17, 128)), ValueError, "mask must be contiguous bool")
    for bits in (1, 9, 0):
        bad("gptq_block", replaced(args, 7, bits), ValueError, f"bits must be in 2..8, got {bits}")


def test_sparsegpt_block_refuses(generator: torch.Generator) -> None:
    case = BlockCase(7, 40, bits=0, prune=(2, 4))
    t = case.tensors(generator)
    args = [t["w"], t["wc"], t["v"], t["diagonal"], None, 2, 4, None, None, None, 0]
    for n, m in ((5, 4), (-1, 4), (1, 0), (2, 7), (1, 128)):
        bad("sparsegpt_block", [*args[:5], n, m, *args[7:]], ValueError, f"B=40, got n={n}, m={m}")
    bad("sparsegpt_block", replaced(args, 3, t["diagonal"][1:]), ValueError, r"diagonal must be .*\[B=40\]")
    bad("sparsegpt_block", replaced(args, 3, t["diagonal"].to("meta")), ValueError, "diagonal is on meta")
    bad("sparsegpt_block", replaced(args, 10, 4), ValueError, "bits=4 needs scales and groups")


def test_layers_that_do_not_fit_are_refused(generator: torch.Generator) -> None:
    case = BlockCase(5, 12, group_size=4, symmetric=False, mask=0.5)
    t = layers(case, 3, generator)[1]
    args = list(block_args("gptq_block", case, t))
    for at, name, words in (
        (1, "wc", r"wc must be \[3, 5, 12\] and v \[3, 12, 12\], got \[2, 5, 12\] and \[3, 12, 12\]"),
        (2, "v", r"w is \[L=3, N=5, B=12\], .*got \[3, 5, 12\] and \[2, 12, 12\]"),
        (3, "scales", r"scales must be contiguous float32 \[L=3, N=5, G\], got torch.float32 \[2, 5, 3\]"),
        (4, "zeros", r"zeros must be contiguous int8 \[3, 5, 3\], got torch.int8 \[2, 5, 3\]"),
        (6, "mask", r"mask must be contiguous bool \[3, 5, 12\], got torch.bool \[2, 5, 12\]"),
    ):
        bad("gptq_block", replaced(args, at, args[at][:2]), ValueError, words)
        bad("gptq_block", replaced(args, at, args[at][0]), ValueError, f"{name} .*got ")  # of one layer, for three
    single = list(block_args("gptq_block", case, {name: x if name == "groups" else x[0] for name, x in t.items()}))
    for at in (1, 2, 3, 4, 6):
        bad("gptq_block", replaced(single, at, args[at]), ValueError, r"w is \[N=5|must be contiguous .*\[(N=)?5")
    groups = args[5].expand(3, 12).contiguous()
    bad(
        "gptq_block",
        replaced(args, 5, groups),
        ValueError,
        r"groups must be contiguous int32 \[B=12\], got .*\[3, 12\]",
    )
    for at, name in enumerate(("w", "wc", "v")):
        for wrong in (args[at][:0], args[at][None], args[at][..., 0, 0], args[at].transpose(0, 1)):
            bad("gptq_block", replaced(args, at, wrong), ValueError, f"{name} must be a contiguous matrix, or L >= 1")

    args = [t["w"], t["wc"], t["v"], t["diagonal"], None, 2, 4, None, None, None, 0]
    wanted = r"diagonal must be contiguous float32 \[L=3, B=12\], got torch.float32 "
    bad("sparsegpt_block", replaced(args, 3, t["diagonal"][0]), ValueError, wanted + r"\[12\]")
    bad("sparsegpt_block", replaced(args, 3, t["diagonal"][:2]), ValueError, wanted + r"\[2, 12\]")


@pytest.mark.of_ops("sparsegpt_block")
def test_a_grid_without_bits_is_not_looked_at(op: str, row: str, generator: torch.Generator) -> None:
    case = BlockCase(5, 12, bits=0, prune=(2, 4))
    args = list(block_args(op, case, layers(case, 3, generator)[1]))
    with llmkern.force(row):
        wanted = OPS[op](*args)
        args[7], args[9] = torch.ones(2, 1), torch.zeros(2, 2, dtype=torch.int32)
        assert all(torch.equal(a, b) for a, b in zip(wanted, OPS[op](*args), strict=True))


def test_scale_search_refuses() -> None:
    args = [torch.ones(3, 8), torch.ones(8), 4, 4, True, 10, 0.5]
    bad("scale_search", replaced(args, 0, torch.ones(3, 8).double()), ValueError, "w must be contiguous float32")
    bad("scale_search", replaced(args, 1, torch.ones(9)), ValueError, r"importance must be float32 \[K=8\]")
    bad("scale_search", replaced(args, 1, torch.ones(8, device="meta")), ValueError, "importance is on meta")
    for size in (0, -1, 9):
        bad("scale_search", replaced(args, 2, size), ValueError, rf"group_size must be in \[1, K=8\], got {size}")
    bad("scale_search", replaced(args, 3, 9), ValueError, "bits must be in 2..8, got 9")
    bad("scale_search", replaced(args, 5, 0), ValueError, "steps >= 1 .*got 0 and 0.5")
    for smallest in (0.0, 1.5):
        bad("scale_search", replaced(args, 6, smallest), ValueError, f"smallest <= 1, got 10 and {smallest}")


@pytest.mark.parametrize("op", ["gptq_block", "sparsegpt_block", "scale_search"])
def test_block_ops_opcheck(op: str, generator: torch.Generator) -> None:
    if op == "scale_search":
        torch.library.opcheck(OPS[op].op, (torch.randn(3, 10), torch.rand(10), 4, 4, False, 5, 0.5))
        return
    case = BlockCase(3, 8, group_size=4, symmetric=False, mask=0.5 if op == "gptq_block" else None, prune=(2, 4))
    each, whole = layers(case, 2, generator)
    for t in (each[0], whole):
        torch.library.opcheck(OPS[op].op, block_args(op, case, t))


@pytest.mark.parametrize("op", ["gptq_block", "sparsegpt_block"])
def test_layers_compile(op: str, generator: torch.Generator) -> None:
    case = BlockCase(3, 8, group_size=4, mask=0.5)
    compiled = torch.compile(lambda *args: OPS[op](*args), fullgraph=True, backend="aot_eager")
    assert_layers_are_calls(op, compiled, case, 3, generator)
