"""The native code without Python under sanitizers: every op at every level of this machine, on arrays of exactly the
size that they need, and the thread pool.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmkern import _features

SANITIZE = Path(__file__).resolve().parents[1] / "tools" / "sanitize.sh"


def _compiles(tmp_path: Path) -> bool:
    """Whether the compiler has the sanitizers."""
    source = tmp_path / "empty.cpp"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    command = ["c++", "-fsanitize=address,undefined", str(source), "-o", str(tmp_path / "empty")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not SANITIZE.is_file(), reason="no tools/ beside the tests")
def test_every_level_under_the_address_sanitizer(tmp_path: Path) -> None:
    if _features.native is None:
        pytest.skip("the native module is not built")
    if not _compiles(tmp_path):
        pytest.skip("the compiler has no address sanitizer")
    run = subprocess.run([SANITIZE, sys.executable, "native"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert " checks, 0 failed" in run.stdout
    for level in _features.levels():
        if level.available:
            assert f"{level.name}: here" in run.stdout


@pytest.mark.skipif(not SANITIZE.is_file(), reason="no tools/ beside the tests")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_pool_under_the_thread_sanitizer() -> None:
    done = subprocess.run([SANITIZE, sys.executable, "pool"], capture_output=True, text=True, timeout=300)
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("the compiler has no thread sanitizer")
    assert done.returncode == 0, done.stderr
    assert "every task ran once" in done.stdout
