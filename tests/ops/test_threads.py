"""Threads: the same bits from any number of them, calls from torch's backward thread, and forks of forks."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from cases import LINEAR_CASES, LinearCase
from torch import Tensor

import llmkern
from llmkern import _features
from llmkern._registry import OPS

OPTIONS = {
    "int4_linear": [
        {"group_size": 100},
        {"group_size": 64, "extra": ("int8",)},
        {"group_size": 8, "extra": ("int8",)},
        {"symmetric": False},
    ],
    "int8_linear": [{"group_size": 50}, {}],
    "int8_dynamic_linear": [{"group_size": 96}, {"group_size": 8}, {"symmetric": False}],
    "sparse24_linear": [{"value_dtype": torch.bfloat16}, {"value_dtype": torch.int8, "group_size": 64}],
    "sparse24_int4_linear": [{"group_size": 100}],
    "bitmask_linear": [{"value_dtype": torch.float32}, {"value_dtype": torch.int8, "group_size": 100}],
}
# (N, K, M), all odd, each enough work for more than one thread.
SHAPES = ((1031, 517, 1), (1031, 517, 7), (517, 1031, 33), (67, 2085, 65), (261, 75, 129))
needs_native = pytest.mark.skipif(_features.native is None, reason=f"no native module: {_features.native_error}")


def test_every_linear_op_has_options() -> None:
    assert set(OPTIONS) == set(LINEAR_CASES)


@pytest.mark.of_ops(*LINEAR_CASES)
@pytest.mark.usefixtures("poisoned")
def test_every_number_of_threads_gives_the_same_bits(op: str, row: str, generator: torch.Generator) -> None:
    if row == "reference":
        pytest.skip("torch's own product; no promise of ours")
    for n, k, m in SHAPES:
        for options in OPTIONS[op]:
            group = options.get("group_size")
            case = LinearCase(op, n, k, **{**options, "group_size": group and min(k, group)})
            for dtype in (torch.float32, torch.bfloat16):
                args = case.args(torch.randn((m, k), generator=generator).to(dtype), None)
                results = {}
                for count in (1, 2, 3, 8):
                    torch.set_num_threads(count)
                    try:
                        with llmkern.force(row):
                            results[count] = OPS[op](*args)
                    finally:
                        torch.set_num_threads(1)
                assert results[1].isfinite().all()
                for count, y in results.items():
                    assert torch.equal(y, results[1]), f"{case}, M={m}, {dtype}: {count} threads"


@needs_native
def test_calls_from_the_thread_of_backward(generator: torch.Generator) -> None:
    """Gradient checkpoints and hooks call ops from autograd's own thread, at the same time as the main one."""
    case = LinearCase("int8_linear", 1031, 517)
    x = torch.randn((3, 517), generator=generator)
    expected, found = OPS["int8_linear"](*case.args(x, None)), []

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            found.append((threading.get_ident(), OPS["int8_linear"](*case.args(x, None))))
            return dy

    torch.set_num_threads(2)
    try:
        callers = [
            threading.Thread(target=lambda: Recompute.apply(x.clone().requires_grad_()).sum().backward())
            for _ in range(6)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    finally:
        torch.set_num_threads(1)
    assert not any(caller.is_alive() for caller in callers)
    assert len(found) == 6
    assert all(torch.equal(y, expected) for _, y in found)


NESTED_FORK = """
import os, sys, torch, llmkern
from llmkern.formats import Int8Weight
torch.manual_seed(0)
w, x = Int8Weight.pack(torch.randn(2048, 513)), torch.randn(1, 513)
torch.set_num_threads(2)
expected = llmkern.ops.int8_linear(x, w)

def child(depth):
    if depth == 0:
        return 0
    pid = os.fork()
    if pid == 0:
        same = all(torch.equal(llmkern.ops.int8_linear(x, w), expected) for _ in range(20))
        os._exit(child(depth - 1) if same else 3)
    same = all(torch.equal(llmkern.ops.int8_linear(x, w), expected) for _ in range(20))  # while the child runs
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if same else 4

sys.exit(child(3))
"""


@needs_native
def test_forks_of_forks_and_their_parents_go_on() -> None:
    done = subprocess.run([sys.executable, "-c", NESTED_FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
