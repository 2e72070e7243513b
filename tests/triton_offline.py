"""Compiles what an op would launch in Triton, for a GPU that is not here, and reads what became of it."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from llmkern.ops import _triton

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Built:
    """One compiled kernel."""

    kernel: str
    constants: dict[str, Any]  # its constexpr arguments
    registers: int
    stack: int  # bytes of a thread: spilled registers
    shared: int  # bytes of a program
    ptx: str


def source(fn: JITFunction, args: tuple, named: dict[str, Any]) -> ASTSource:
    """The kernel with the arguments that Triton would make constant or know to be multiples of 16."""
    values = dict(zip(fn.arg_names, args, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(fn.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:  # torch aligns what it allocates to more than 16 bytes
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constants, attributes)


@functools.cache
def tool(name: str) -> str:
    """A program of the CUDA toolkit that comes with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and the like of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


@contextmanager
def launches(capability: tuple[int, int]) -> Iterator[list[tuple[JITFunction, tuple, dict[str, Any]]]]:
    """Launches are recorded, not done, and every GPU is of this capability."""
    recorded: list[tuple[JITFunction, tuple, dict[str, Any]]] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        recorded.append((self, args, named))

    with patch.object(JITFunction, "run", run), patch.object(_triton, "capability", lambda _: capability):
        yield recorded


def build(op: str, args: tuple, capability: tuple[int, int], function: str = "run") -> list[Built]:
    """Every kernel that the op launches for these arguments, which may be tensors without data, on the device meta.

    `function` of its Triton module is called.
    """
    with launches(capability) as recorded:
        getattr(import_module(f"llmkern.ops.{op}.triton"), function)(*args)
    assert recorded, f"{op} launches nothing"
    target, built = GPUTarget("cuda", 10 * capability[0] + capability[1], 32), []
    for fn, given, named in recorded:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        compiled = triton.compile(source(fn, given, named), target=target, options=options)
        used = usage(compiled.asm["cubin"])
        constants = {name: value for name, value in named.items() if name.isupper()}
        built.append(
            Built(fn.__name__, constants, used["REG"], used["STACK"], compiled.metadata.shared, compiled.asm["ptx"])
        )
    return built


def compile_for_amd(op: str, args: tuple, arch: str, capability: tuple[int, int]) -> Any:
    """The product that the op launches for these arguments, compiled for an AMD GPU; see `build`."""
    with launches(capability) as recorded:
        import_module(f"llmkern.ops.{op}.triton").run(*args)
    fn, given, named = next(launch for launch in recorded if launch[0].__name__ == "product")
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    return triton.compile(source(fn, given, named), target=GPUTarget("hip", arch, 64), options=options)
