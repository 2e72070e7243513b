"""`llmkern env`: the machine, the build, and every kernel: runnable or why not, and whether it computes rightly."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from llmkern_cli._common import table

NAME = "env"
HELP = "The machine, the build, and every kernel: runnable or why not, and a self-test."
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "tokenizers", "accelerate", "compressed-tensors")


def arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, machine, levels and kernels; `error` when a self-test fails."""
    import torch

    import llmkern
    from llmkern import _features
    from llmkern_cli import _selftest

    rows = []
    for row in llmkern.kernels():
        tested = _selftest.check(row.op, row.kernel, row.device) if row.runnable else None
        rows.append({**row._asdict(), "reason": _pasteable(row.reason), "self_test": tested})
    result: dict[str, Any] = {
        "llmkern": llmkern.__version__,
        "python": platform.python_version(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": _pasteable(_features.native_error) or "loaded",
        "cuda": _pasteable(_features.cuda_error) or "loaded",
        "disabled": sorted(_features.disabled()),
        "levels": [level._asdict() for level in _features.levels()],
        "kernels": rows,
    }
    failed = [f"{row['op']} {row['kernel']}" for row in rows if row["runnable"] and row["self_test"] != "ok"]
    if failed:
        result["error"] = f"self-test failed: {', '.join(failed)}"
    return result


def show(result: dict[str, Any]) -> str:
    """Facts first, then one line per kernel."""
    packages = ", ".join(f"{name} {number or 'absent'}" for name, number in result["packages"].items())
    levels = ", ".join(level["name"] if level["available"] else f"no {level['name']}" for level in result["levels"])
    facts = [
        ("llmkern", f"{result['llmkern']}, Python {result['python']}"),
        ("packages", packages),
        ("machine", f"{result['machine']['cpu']}, {result['machine']['cores']} cores, {result['machine']['system']}"),
        ("threads", str(result["threads"])),
        ("GPUs", ", ".join(result["gpus"]) or "none"),
        ("native module", result["native"]),
        ("CUDA module", result["cuda"]),
        ("CPU levels", levels or "none"),
    ]
    if result["disabled"]:
        facts.append(("LLMKERN_DISABLE", ", ".join(result["disabled"])))
    lines = [f"{name + ':':16}{value}" for name, value in facts]
    rows = [(row["op"], row["kernel"], row["device"], _state(row)) for row in result["kernels"]]
    lines += ["", table(("op", "kernel", "device", "here"), rows)]
    if "error" in result:
        lines += ["", result["error"]]
    return "\n".join(lines)


def _state(row: dict[str, Any]) -> str:
    return f"self-test {row['self_test']}" if row["runnable"] else f"no: {row['reason']}"


def _pasteable(text: str) -> str:
    """Without the user's home folder."""
    return text.replace(str(Path.home()), "~")


def machine() -> dict[str, Any]:
    """CPU model, logical cores this process may use, and operating system; nothing that names the user."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_name(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
