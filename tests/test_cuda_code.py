"""What the compiler made of the CUDA kernels, read from the installed module: no GPU is needed for that.

Every kernel keeps its values in registers, and computes with the instructions that it was written for.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from llmkern import _features

# Part of a kernel's name -> instructions that its code must have (SASS, by architecture).
WANTED = {
    "stream_kernel": {"80": ["HMMA.16816"], "90a": ["HMMA.16816"]},
}
ARCHITECTURES = ("80", "90a")


@cache
def cuobjdump() -> Path:
    """The tool, from the Triton wheel or the CUDA toolkit."""
    try:
        import triton
    except ImportError:
        pytest.skip("no cuobjdump: triton is not installed")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton brings no cuobjdump")
    return tool


def dump(*options: str) -> str:
    if _features.cuda is None:
        pytest.skip("the CUDA module is not built")
    command = [cuobjdump(), *options, _features.cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(text: str, header: str) -> dict[tuple[str, str], str]:
    """(architecture, mangled name) -> what is said of it."""
    found = {}
    for part in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        architecture = part.split()[0]
        for body in part.split(header)[1:]:
            found[architecture, body.split(":", 1)[0].split()[0]] = body
    return found


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled name) -> REG, STACK, and so on."""
    found = kernels(dump("--dump-resource-usage"), " Function ")
    return {
        at: {key: int(number) for key, number in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", body)}
        for at, body in found.items()
    }


@cache
def instructions() -> dict[tuple[str, str], Counter]:
    """(architecture, mangled name) -> how often each instruction stands in it."""
    found = kernels(dump("--dump-sass"), "\t\tFunction : ")
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)")
    return {at: Counter(opcode.findall(body)) for at, body in found.items()}


def test_every_architecture_is_in() -> None:
    assert {architecture for architecture, _ in resources()} >= set(ARCHITECTURES)


def test_nothing_spills() -> None:
    spilled = {at: used for at, used in resources().items() if used["STACK"] or used["LOCAL"]}
    assert not spilled
    assert all(used["REG"] <= 255 for used in resources().values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("part", WANTED)
def test_the_intended_instructions(part: str, architecture: str) -> None:
    mine = {name: counts for (arch, name), counts in instructions().items() if arch == architecture and part in name}
    assert mine or architecture not in WANTED[part], f"no kernel of {part} for sm_{architecture}"
    for name, counts in mine.items():
        for wanted in WANTED[part][architecture]:
            assert any(opcode.startswith(wanted) for opcode in counts), f"{name}: no {wanted}"
