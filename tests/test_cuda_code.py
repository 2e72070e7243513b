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
import sass_hazards

from llmkern import _features

# Kernel -> instructions (SASS) that all of its instances have, on every architecture or on sm_90a alone.
ALWAYS = {
    "stream_kernel": ["HMMA.16816"],
    "tile_kernel": ["HMMA.16816", "LDGSTS"],
    "integer_stream_kernel": ["IMMA.16832.S8.S8"],
    "integer_tile_kernel": ["IMMA.16832.S8.S8", "LDGSTS"],
    "sparse_stream_kernel": ["HMMA.SP.16832"],
    "sparse_tile_kernel": ["HMMA.SP.16832", "LDSM"],
    "mask_stream_kernel": ["HMMA.16816"],
    "mask_tile_kernel": ["HMMA.16816"],
    "columns_kernel": ["FFMA", "LDGSTS"],
}
HOPPER = {
    "wgmma_kernel": ["HGMMA.64", "LDGSTS", "UTMALDG", "SYNCS", "USETMAXREG"],
    "integer_wgmma_kernel": ["IGMMA.64", "LDGSTS"],
    "integer_copied_kernel": ["IGMMA.64", "UTMALDG"],
    "integer_nibbles_kernel": ["IGMMA.64", "UTMALDG"],
    "sparse_wgmma_kernel": ["HGMMA.SP.64", "UTMALDG"],
    "ring_kernel": ["HMMA.", "UTMALDG", "UBLKCP", "SYNCS"],
}
# Bytes of the stack that instances at the limit of their registers use, outside their products: part of the mangled
# name -> the most.
SPILLED = {
    "mask_tile_kernelIa": 24,  # int8 values with groups of columns: the scales of eight pairs of rows
    "ELi2ELNS0_10RingScales": 48,  # 16 rows of x at 128 registers: beside their zeros, or scales of lanes
    "ELi4ELi128EEEvNS0_9WgmmaArgs": 64,  # 112 registers for 64 sums leave 32 for what fills stages
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
def code() -> dict[tuple[str, str], str]:
    """(architecture, mangled name) -> its SASS."""
    return kernels(dump("--dump-sass"), "\t\tFunction : ")


@cache
def instructions() -> dict[tuple[str, str], Counter]:
    """(architecture, mangled name) -> how often each instruction stands in it."""
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)")
    return {at: Counter(opcode.findall(body)) for at, body in code().items()}


def test_every_architecture_is_in() -> None:
    assert {architecture for architecture, _ in resources()} >= set(ARCHITECTURES)


def test_nothing_spills() -> None:
    for (architecture, name), used in resources().items():
        allowed = next((most for part, most in SPILLED.items() if part in name), 0)
        assert used["STACK"] <= allowed, f"sm_{architecture} {name}: {used['STACK']} bytes of stack"
        assert not used["LOCAL"], f"sm_{architecture} {name}: local memory"


def test_every_kernel_is_expected() -> None:
    names = {kernel_of(name) for _, name in resources()}
    assert names - {"quantize_kernel", "search_kernel"} == {*ALWAYS, *HOPPER}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_intended_instructions(architecture: str) -> None:
    wanted = ALWAYS | (HOPPER if architecture == "90a" else {})
    for (arch, name), counts in instructions().items():
        if arch != architecture:
            continue
        for opcode in wanted.get(kernel_of(name), []):
            unaligned = opcode in ("LDGSTS", "LDSM") and "Lb0E" in name  # rows that no copy of 16 bytes fits
            assert unaligned or any(found.startswith(opcode) for found in counts), f"{name}: no {opcode}"


def test_no_register_of_a_product_under_way_is_written() -> None:
    with_products = {at for at, counts in instructions().items() if any("GMMA" in name for name in counts)}
    assert with_products
    for at in with_products:
        assert sass_hazards.loops(sass_hazards.parse(code()[at])), f"{at}: no loop with products"
        assert not (found := sass_hazards.hazards(code()[at])), f"{at}: {found[:3]}"


PRODUCTS = """
    /*0010*/  MOV R72, R8 ;
    /*0020*/  HGMMA.SP.64x64x32.F32.BF16 R24, R60, gdesc[UR20], R24, R72, 0x0 ;
    /*0030*/  HGMMA.SP.64x64x32.F32.BF16 R24, R56, gdesc[UR20], R24, R72, 0x1, gsb0 ;
    /*0040*/  {before}
    /*0050*/  WARPGROUP.DEPBAR.LE gsb0, {pending} ;
    /*0060*/  LDS.128 R56, [R2] ;
    /*0070*/  @!P0 BRA 0x10 ;
"""


@pytest.mark.parametrize(
    ("before", "pending", "number"),
    [
        ("LDS.128 R4, [R56] ;", "0x0", 0),
        ("@P0 IMAD.WIDE R62, R3, R4, R5 ;", "0x0", 2),  # once in each round
        ("SEL R72, R3, R4, P1 ;", "0x0", 4),
        ("STS.128 [R2], R56 ;", "0x0", 0),
        ("NOP ;", "0x1", 4),  # the last group is still under way: LDS in each round, MOV in the second
    ],
)
def test_hazards_are_found(before: str, pending: str, number: int) -> None:
    assert len(sass_hazards.hazards(PRODUCTS.format(before=before, pending=pending))) == number


def kernel_of(name: str) -> str:
    """The function's own name in a mangled one."""
    found = re.search(r"\d+([a-z_]+_kernel)", name)
    assert found, name
    return found[1]
