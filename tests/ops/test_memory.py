"""No kernel reads past the end of a tensor: every input ends where an unreadable page begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cases import LINEAR_CASES

from llmkern import _features

GUARD = """
import ctypes, mmap, sys, torch, llmkern
sys.path.insert(0, {tests!r})
from cases import CASES
from llmkern._registry import OPS

libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
torch.set_num_threads(2)

def guarded(tensor):
    if tensor.nbytes == 0:
        return tensor
    pages = -(-tensor.nbytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(start + pages * page, page, 0) == 0
    at = pages * page - tensor.nbytes
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=at).view(tensor.dtype)
    return flat.view(tensor.shape).copy_(tensor)
"""
RUN = """
done = 0
for case in CASES[{op!r}]:
    weight = [guarded(arg) if isinstance(arg, torch.Tensor) else arg for arg in case.args(torch.ones(case.k), None)[1:]]
    for m in (1, 3, 17, 30):
        for dtype in (torch.float32, torch.bfloat16):
            x = guarded(torch.ones(m, case.k, dtype=dtype))
            for row in llmkern.kernels({op!r}):
                if row.runnable and row.device == "cpu":
                    with llmkern.force(row.kernel):
                        OPS[{op!r}](x, *weight)
                    done += 1
print(done)
"""


def run(code: str, **names: str) -> subprocess.CompletedProcess:
    text = (GUARD + code).format(tests=str(Path(__file__).resolve().parent.parent), **names)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)


def test_the_guard_page_is_unreadable() -> None:
    inside = "t = guarded(torch.arange(5)); ctypes.string_at(t.data_ptr() + t.nbytes - {back}, 1)"
    assert run(inside, back="1").returncode == 0
    assert run(inside, back="0").returncode < 0


@pytest.mark.skipif(_features.native is None, reason=f"no native module: {_features.native_error}")
@pytest.mark.parametrize("op", list(LINEAR_CASES))
def test_no_kernel_reads_past_the_end(op: str) -> None:
    done = run(RUN, op=op)
    assert done.returncode == 0, f"killed by signal {-done.returncode}" if done.returncode < 0 else done.stderr
    assert int(done.stdout) >= 6 * len(LINEAR_CASES[op])
