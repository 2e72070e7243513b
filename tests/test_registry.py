"""The table of kernels: order, force, why, LLMKERN_DISABLE; calls from several threads and from a forked child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cases import CASES, LINEAR_CASES

import llmkern
from llmkern import _features
from llmkern._registry import OPS, Kernel, Op

NATIVE = _features.native is not None
IN_BUILD = [level.name for level in _features.levels()]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "LLMKERN_DISABLE"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)


def test_kernels_lists_every_row() -> None:
    rows = llmkern.kernels()
    assert {row.op for row in rows} == set(OPS)
    for op in OPS:
        mine = llmkern.kernels(op)
        assert mine == [row for row in rows if row.op == op]
        assert len({row.kernel for row in mine}) == len(mine)
        assert (mine[-1].kernel, mine[-1].device, mine[-1].runnable) == ("reference", "any", True)
        for row in mine:
            assert row.runnable == (row.reason == "")
            assert row.device in ("cpu", "cuda", "any")
    with pytest.raises(ValueError, match=r"^kernels: unknown op 'no_op'; known: .*int4_linear"):
        llmkern.kernels("no_op")


def test_best_level_comes_first() -> None:
    best_first = [f"cpu.{name}" for name in reversed(IN_BUILD)]
    for op in OPS:
        native = [row.kernel for row in llmkern.kernels(op) if row.device == "cpu"]
        if NATIVE:
            assert native == [name for name in best_first if name in native]
        else:
            assert native == ["cpu.native"]
            assert "native module failed to load" in llmkern.kernels(op)[0].reason


def test_why_names_what_runs_and_why_the_rest_does_not() -> None:
    for op in ("int8_linear", "sparse24_linear"):
        case = CASES[op][3]
        x = torch.ones(2, case.k)
        lines = llmkern.why(op, x, case.weight()).splitlines()
        rows = llmkern.kernels(op)
        assert len(lines) == len(rows)
        first = next(i for i, row in enumerate(rows) if row.runnable)
        for i, (line, row) in enumerate(zip(lines, rows, strict=True)):
            assert line.startswith(f"{op}: {row.kernel}: ")
            text = line.removeprefix(f"{op}: {row.kernel}: ")
            wanted = row.reason or ("runs" if i == first else "can run, but comes after the one that runs")
            assert text == wanted
        assert llmkern.why(getattr(llmkern.ops, op), x, case.weight()).splitlines() == lines
        assert OPS[op].pick(*case.args(x, None)).name == rows[first].kernel
    assert llmkern.why("linear", x, case.weight()).splitlines() == lines
    with pytest.raises(ValueError, match=r"^why: unknown op 'no_op'"):
        llmkern.why("no_op", x, case.weight())


def test_why_for_another_device() -> None:
    case = CASES["int8_linear"][3]
    text = llmkern.why("int8_linear", torch.ones(2, case.k, device="meta"), case.weight().to("meta"))
    for line, row in zip(text.splitlines(), llmkern.kernels("int8_linear"), strict=True):
        assert line.endswith(row.reason or ("needs a cpu tensor, got meta" if row.device == "cpu" else ": runs"))


def test_force_refuses_unknown_names_and_missing_rows() -> None:
    with (
        pytest.raises(ValueError, match=r"^force: unknown kernel 'cpu.mmx'; known: .*reference"),
        llmkern.force("cpu.mmx"),
    ):
        pass
    op = OPS["int8_linear"]
    case = CASES["int8_linear"][3]
    args = case.args(torch.ones(2, case.k), None)
    blocked = next((row for row in llmkern.kernels("int8_linear") if not row.runnable), None)
    if blocked is not None:
        with llmkern.force(blocked.kernel), pytest.raises(NotImplementedError, match="it cannot run here") as raised:
            op(*args)
        assert blocked.reason in str(raised.value)
    foreign = {row.kernel for row in llmkern.kernels()} - {row.kernel for row in llmkern.kernels("int8_linear")}
    for name in foreign:
        with llmkern.force(name), pytest.raises(NotImplementedError, match="this op has no such kernel"):
            op(*args)


def test_a_row_yields_to_a_later_one_and_runs_if_that_is_gone() -> None:
    """GPU rows: which of them runs depends on the sizes; the last rows of a table yield to none."""

    def row(name: str, least: int | None) -> Kernel:
        yields = None if least is None else lambda m: f"not for {m} rows" if m < least else None
        return Kernel(name, "any", run=lambda m: name, yields=yields)

    large, middle, small, reference = row("large", 64), row("middle", 17), row("small", 0), row("reference", None)
    table = [large, middle, small, reference]
    assert [Op._choice(table, (m,)) for m in (1, 17, 64)] == [small, middle, large]
    assert Op._choice([large, middle, reference], (1,)) is middle  # small is disabled, or cannot run
    assert Op._choice([large, reference], (1,)) is large
    assert Op._choice([large, middle], (1,)) is middle
    assert Op._choice([reference], (1,)) is reference
    assert Op._choice([], (1,)) is None


def test_force_ends_with_its_block_and_is_of_one_thread() -> None:
    case = CASES["int8_linear"][3]
    args = case.args(torch.ones(2, case.k), None)
    usual = OPS["int8_linear"].pick(*args).name
    seen = []
    with llmkern.force("reference"):
        assert OPS["int8_linear"].pick(*args).name == "reference"
        other = threading.Thread(target=lambda: seen.append(OPS["int8_linear"].pick(*args).name))
        other.start()
        other.join()
        with llmkern.force(usual):
            assert OPS["int8_linear"].pick(*args).name == usual
        assert OPS["int8_linear"].pick(*args).name == "reference"
    assert seen == [usual]
    assert OPS["int8_linear"].pick(*args).name == usual


PRINT_ROWS = """
import torch, llmkern
from llmkern.formats import Int8Weight
w = Int8Weight.pack(torch.ones(4, 8))
print(llmkern.why("int8_linear", torch.ones(1, 8), w))
llmkern.ops.int8_linear(torch.ones(1, 8), w)
"""


def test_disable_lowers_the_level() -> None:
    runnable = [row.kernel for row in llmkern.kernels("int8_linear") if row.runnable]
    for count in range(1, len(runnable)):
        names = ",".join(name.removeprefix("cpu.") if count % 2 else name for name in runnable[:count])
        done = python(PRINT_ROWS, LLMKERN_DISABLE=f" {names} ,")
        assert done.returncode == 0, done.stderr
        assert f"int8_linear: {runnable[count]}: runs" in done.stdout
        for name in runnable[:count]:
            assert f"int8_linear: {name}: {name} is disabled by LLMKERN_DISABLE" in done.stdout


def test_disabling_everything_is_an_error_with_reasons() -> None:
    done = python(PRINT_ROWS, LLMKERN_DISABLE=",".join(sorted({row.kernel for row in llmkern.kernels()})))
    assert done.returncode == 1
    assert "int8_linear: no kernel can run:" in done.stderr
    assert "reference is disabled by LLMKERN_DISABLE" in done.stderr


def test_disable_refuses_unknown_names() -> None:
    done = python("import llmkern", LLMKERN_DISABLE="reference,cpu.mmx")
    assert done.returncode == 1
    assert "LLMKERN_DISABLE: unknown name 'cpu.mmx'; known: " in done.stderr


def test_calls_from_several_threads(generator: torch.Generator) -> None:
    work = []
    for op, cases in LINEAR_CASES.items():
        for case in [case for case in cases if (case.n, case.k) in ((64, 576), (129, 260))][:2]:
            for m in (1, 5, 40):
                args = case.args(torch.randn((m, case.k), generator=generator), None)
                work.append((op, args, OPS[op](*args)))
    w = llmkern.formats.Int8Weight.pack(torch.randn((2048, 512), generator=generator))  # worth two threads
    x = torch.randn((1, 512), generator=generator)
    work += [("int8_linear", (x, *w.op_args(None)), llmkern.ops.int8_linear(x, w))] * len(work)
    assert len(work) >= 24
    wrong: list[str] = []
    start = threading.Barrier(4)

    def run(shift: int) -> None:
        torch.set_num_threads(2)  # else no call asks for the pool, and no two callers meet there
        start.wait()
        for i in range(6 * len(work)):
            op, args, expected = work[(i * 7 + shift * 5) % len(work)]
            y = OPS[op](*args)
            if not torch.equal(y, expected) and not torch.allclose(y, expected, rtol=1e-4, atol=1e-4):
                wrong.append(op)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.skipif(not NATIVE, reason="the native module is not built, and torch's own pool does not survive a fork")
def test_a_forked_child_can_call_an_op(generator: torch.Generator) -> None:
    op = "int8_linear"
    assert OPS[op].pick(*CASES[op][3].args(torch.ones(2, CASES[op][3].k), None)).name.startswith("cpu.")
    n, k = 1024, 1024  # large enough for several threads
    w = llmkern.formats.Int8Weight.pack(torch.randn((n, k), generator=generator))
    x = torch.randn((1, k), generator=generator)
    torch.set_num_threads(2)
    try:
        expected = llmkern.ops.int8_linear(x, w)  # the pool has started
    finally:
        torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        same = torch.equal(llmkern.ops.int8_linear(x, w), expected)
        # The parent's workers are not here: the child's own must have started.
        tasks = Path("/proc/self/task")
        alone = tasks.is_dir() and len(os.sched_getaffinity(0)) > 1 and len(list(tasks.iterdir())) < 2
        os._exit(3 if not same else 4 if alone else 0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")
