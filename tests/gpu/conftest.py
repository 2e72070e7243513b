"""Tests of a GPU: `pytest tests/gpu`; without one they are skipped. `--device cpu` runs them on CPU tensors and the
CPU's kernels, which shows that the tests themselves work; what only a GPU has is skipped there.

A failing kernel may take the CUDA context with it, after which every later test would fail too: the process ends then,
and `make gpu` goes on behind that test.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import on_device
import pytest
import torch

# Asked for by cuBLAS when torch fills new memory with NaN; has to be set before the context is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
LOST = 70  # exit code


class NoDevice(pytest.Module):
    """A file of tests that has no device to run on."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip("needs a CUDA device", allow_module_level=True)


def pytest_configure(config: pytest.Config) -> None:
    on_device.DEVICE = config.getoption("--device")
    if on_device.DEVICE == "cpu":
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's last: most of their time is its compiler's, and the time of a run on a GPU may end before."""
    items.sort(key=lambda item: "triton" in item.name)


def pytest_pycollect_makemodule(module_path: object, parent: pytest.Collector) -> pytest.Module | None:
    if on_device.DEVICE == "cuda" and not torch.cuda.is_available():
        return NoDevice.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """torch's products are what ours are measured by: without TF32, and with sums in fp32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    half = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before
    matmul.allow_fp16_reduced_precision_reduction = half


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty fills with NaN on the device, so an element that a kernel leaves out shows."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.ones(2, device=on_device.DEVICE).new_empty(9).isnan().all()
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.failed and on_device.DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(f"\n{item.nodeid} lost the CUDA context: {error}\n{report.longreprtext}", file=sys.stderr, flush=True)
            os._exit(LOST)
    return report
