"""The CUDA kernels on this CPU, thread by thread (tests/native/emulate_cuda): values, indices, barriers, memory.

The module is built from the same sources; what stands in for the GPU's instructions is written from the PTX ISA. It
says nothing about speed, and nothing about what the compiler for GPUs makes of the sources.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, LinearCase
from test_ops import expected, make_bias
from torch import Tensor

from llmkern import testing
from llmkern.ops import _cuda

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / ".cache" / "emulate_cuda"
GPU = _cuda.Gpu((9, 0), 132)
OLD_GPU = _cuda.Gpu((8, 0), 108)


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module _cuda of the emulation, built on first use."""
    if shutil.which("cmake", path=_path()) is None or shutil.which("ninja", path=_path()) is None:
        pytest.skip("cmake or ninja is missing")
    configure = [
        "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DLLMKERN_EMULATE_CUDA=ON", "-DLLMKERN_CUDA=OFF",
        "-DLLMKERN_WERROR=ON", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={_output([sys.executable, '-m', 'pybind11', '--cmakedir'])}",
    ]  # fmt: skip
    _output(configure)
    _output(["cmake", "--build", BUILD, "--target", "_cuda"])
    (built,) = BUILD.glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("emulated._cuda", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _path() -> str:
    return f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"


def _output(command: list[Any]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": _path()})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


def run(emulated: ModuleType, kernel: str, case: LinearCase, x: Tensor, bias: Tensor | None, gpu: Any = GPU) -> Tensor:
    """The op of a case on one of its CUDA kernels."""
    op = importlib.import_module(f"llmkern.ops.{case.op}")
    args = case.args(x, bias)
    assert op.cuda_rejects(kernel, *args) is None
    return op.cuda(kernel, getattr(getattr(emulated, case.op), kernel), gpu, *args)


def codes_cases(op: str) -> list[LinearCase]:
    """One row, odd sizes, rows that are and are not aligned, groups of a chunk and of less, short last groups."""
    return [
        LinearCase(op, 1, 1),
        LinearCase(op, 7, 13, scale_dtype=BF16, symmetric=False),
        LinearCase(op, 33, 75, group_size=32, scale_dtype=F16),
        LinearCase(op, 17, 260, group_size=64, symmetric=False),
        LinearCase(op, 64, 576, group_size=128, scale_dtype=BF16),
        LinearCase(op, 40, 1056, group_size=128, symmetric=False),
        LinearCase(op, 35, 544),
        LinearCase(op, 24, 544, group_size=64, symmetric=False),
        LinearCase(op, 20, 2144, group_size=32, symmetric=False),
    ]


CASES = [case for op in ("int4_linear", "int8_linear") for case in codes_cases(op)]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case}")
@pytest.mark.usefixtures("poisoned")
def test_values(emulated: ModuleType, case: LinearCase, dtype: torch.dtype, generator: torch.Generator) -> None:
    for at, m in enumerate((1, 3, 8, 9, 17)):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, "stream", case, x, bias, OLD_GPU if at == 2 else GPU)
        testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}")
