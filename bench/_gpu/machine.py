"""What a GPU result says about where it was taken."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

import llmkern
from bench.results import about

SMI = "/usr/bin/nvidia-smi"
QUERY = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "clocks_throttle_reasons.active",
)  # fmt: skip
PACKAGES = (
    "triton",
    "torchao",
    "bitsandbytes",
    "gemlite",
    "humming-kernels",
    "nvidia-cublas",
    "nvidia-cusparselt-cu13",
)


def describe(device: str, commit: str | None) -> dict[str, Any]:
    """Machine, GPU, driver, clocks, commit and versions. commit: where the tree is no repository."""
    found = {**about(), "gpu": None, "clocks": smi(), "cuda": torch.version.cuda, "nvcc": nvcc()}
    found["commit"] = found["commit"] or commit
    found["versions"] = {name: version for name in PACKAGES if (version := _version(name))}
    found["kernels"] = {
        row.op: [other.kernel for other in llmkern.kernels(row.op) if other.runnable and other.device == device]
        for row in llmkern.kernels()
    }
    found["refused"] = sorted(
        {f"{row.kernel}: {row.reason}" for row in llmkern.kernels() if row.device == device and not row.runnable}
    )
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }  # fmt: skip
    found["python"] = platform.python_version()
    return found


def smi() -> dict[str, str] | None:
    """Driver, clocks, power and temperature now; None without nvidia-smi."""
    if not (tool := shutil.which("nvidia-smi") or shutil.which(SMI)):
        return None
    query = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else None


def nvcc() -> str | None:
    """The release of the nvcc on the path, or of the one where CUDA installs itself."""
    if not (tool := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        return None
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release ([\d.]+)", done.stdout)
    return match[1] if match else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
