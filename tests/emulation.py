"""The CUDA kernels on this CPU, thread by thread (tests/native/emulate_cuda): building the module, calling it."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases import LinearCase
from torch import Tensor

from llmkern.ops import _cuda

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / ".cache" / "emulate_cuda"
GPU = _cuda.Gpu((9, 0), 132)
OLD_GPU = _cuda.Gpu((8, 0), 108)


@cache
def build() -> ModuleType:
    """The module _cuda of the emulation; skips the test where it cannot be built."""
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
