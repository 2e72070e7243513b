"""Memory: how much a process may still take (what budgets and `--stream auto` go by), and a tensor's bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process can still take on `device`; None where the system does not tell.

    On a CPU the least of: what the machine has left, what the process's control groups (v2) leave, and its limit on
    data (RLIMIT_DATA). Memory that only caches files counts as available.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min((size for size in (_machine(), *_groups(), _limit()) if size is not None), default=None)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be read or written."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def fill(tensor: Tensor, file: IO[bytes]) -> bool:
    """Read a contiguous tensor on the CPU from an unbuffered file; False where the file ends too early."""
    left = raw(tensor)
    while len(left):
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            return False
        left = left[count:]
    return True


def _machine() -> int | None:
    if (size := _field(PROC / "meminfo", "MemAvailable:")) is not None:
        return size
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _groups() -> list[int]:
    """What each control group around this process leaves."""
    try:
        own = next(line[3:] for line in (PROC / "self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder, left = CGROUPS / own.strip("/"), []
    while folder == CGROUPS or CGROUPS in folder.parents:
        try:
            most, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
            if most != "max":
                left.append(max(0, int(most) - used + (_field(folder / "memory.stat", "inactive_file") or 0)))
        except (OSError, ValueError):
            pass  # the root group has no such files
        folder = folder.parent
    return left


def _limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = getattr(resource, "RLIMIT_DATA", None)
    if limit is None or (most := resource.getrlimit(limit)[0]) == resource.RLIM_INFINITY:
        return None
    used = _field(PROC / "self/status", "VmData:")
    return None if used is None else max(0, most - used)


def _field(path: Path, name: str) -> int | None:
    """The number behind `name` in a file of lines, in bytes (a unit of kB is taken into account)."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return None
