"""CPU levels: the .def files match what is built, and no object file holds instructions above its level."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import llmkern
from llmkern import _features
from llmkern._registry import OPS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
X86 = platform.machine() in ("x86_64", "AMD64")
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())  # as compilers say it
needs_native = pytest.mark.skipif(_features.native is None, reason=f"no native module: {_features.native_error}")
needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="no csrc/ beside the tests")

# Instructions that tell a level from those below it, as objdump prints them.
MARKS = {
    "VEX (AVX and later)": r"\tv(?!er[rw]\b|m[a-z]+\b)[a-z0-9]+ |%ymm",
    "BMI2 or LZCNT": r"\t(?:pdep|pext|bzhi|mulx|rorx|sarx|shlx|shrx|lzcnt|andn|blsr|blsi|blsmsk)[lq]? ",
    "SSSE3 or later": r"\t(?:pmulld|pm(?:in|ax)(?:s[bd]|u[wd])|p(?:ext|ins)r[bdq]|pmov[sz]x\w+|pblend\w+|pshufb|palignr"
    r"|ptest|pcmp(?:eq|gt)q|round[ps][sd]|blendv?p[sd]|insertps|extractps|popcnt)[lqw]? ",
    "AVX-512": r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])",
    "AVX-512 BF16": r"\tv(?:dpbf16ps|cvtne2?ps2?\w*bf16)",
    "AVX-512 FP16": r"\tv(?:\w+ph |\w+sh )",
    "AMX": r"%tmm|\t(?:ldtilecfg|sttilecfg|tilerelease|tile\w+|tdp\w+) ",
    "LSE": r"\t(?:cas|swp|ld(?:add|clr|eor|set|[su](?:max|min))|st(?:add|clr|eor|set|[su](?:max|min)))[alp]*[bh]?\t",
    "CRC32": r"\tcrc32c?[bhwx]\t",
    "RDM": r"\tsqrdml[as]h\t",
    "FP16": r"\tf(?!cvt)\w+\t(?:v\d+\.[48]h|h\d+)",
    "dot products": r"\t[su]dot\t",
    "I8MM": r"\t(?:[su]mmla|usmmla|usdot|sudot)\t",
    "BF16": r"\tbf(?:dot|mmla|mlal[bt]|cvtn?2?)\t",
    "SVE": r"\tz\d+\.|\bz\d+\.[bhsd]\b|\bp\d+/[mz]\b",
}
# tzcnt is in no list: compilers write it for bsf too, as its bytes run as bsf on a machine that lacks it.
# vcvtph2ps and vcvtps2ph are F16C, of avx2.
F16C = re.compile(r"\tvcvt(?:ph2ps|ps2ph) ")
FORBIDDEN = {
    "baseline": tuple(MARKS),
    "avx2": ("AVX-512", "AVX-512 BF16", "AVX-512 FP16", "AMX"),
    "avx512_vnni": ("AVX-512 BF16", "AVX-512 FP16", "AMX"),
    "avx512_bf16": ("AVX-512 FP16", "AMX"),
    "amx": ("AVX-512 BF16", "AVX-512 FP16"),
    "neon_dotprod": ("I8MM", "BF16", "SVE"),
    "neon_i8mm": ("BF16", "SVE"),
}


def def_rows(path: Path, macro: str) -> list[str]:
    """The first argument of every row of a .def file that counts on this machine."""
    names, skip = [], False
    for line in path.read_text().splitlines():
        if line.startswith("#if"):
            skip = line != f"#if defined(__{MACHINE}__)"
        elif line.startswith("#endif"):
            skip = False
        elif (match := re.match(rf"{macro}\((\w+)", line)) and not skip:
            names.append(match[1])
    return names


@needs_native
@needs_sources
def test_levels_def_is_what_is_built() -> None:
    names = def_rows(CSRC / "common" / "levels.def", "LLMKERN_LEVEL")
    assert names == [level.name for level in _features.levels()]
    assert set(names) <= set(FORBIDDEN), "a level without a rule in this file"
    assert names[0] == "baseline"
    assert _features.levels()[0].available
    for level in _features.levels():
        assert level.available == (level.reason == "")
        if not level.available:
            assert level.reason.startswith(f"this machine lacks {level.name}")


@needs_native
@needs_sources
def test_kernels_def_is_what_the_table_lists() -> None:
    order = [level.name for level in _features.levels()]
    found = {path.parent.name: path for path in CSRC.glob("cpu/*/kernels.def")}
    assert found
    for op in OPS:
        listed = [row.kernel.removeprefix("cpu.") for row in llmkern.kernels(op) if row.device == "cpu"]
        built = def_rows(found[op], "LLMKERN_KERNEL") if op in found else []
        assert listed == sorted(built, key=order.index, reverse=True)
        for level in built:
            assert (CSRC / "cpu" / op / f"{level}.cpp").is_file()
    assert set(found) <= set(OPS), "a directory of kernels that no op uses"


def object_files(target: str = "_C.dir", under: str = "build/**") -> list[Path]:
    """The objects of the newest build of the module, or of another target, under build/."""
    builds: dict[Path, list[Path]] = {}
    for path in ROOT.glob(f"{under}/{target}/**/csrc/**/*.o"):
        builds.setdefault(next(parent for parent in path.parents if parent.name == target), []).append(path)
    newest = max(builds.values(), key=lambda paths: max(path.stat().st_mtime for path in paths), default=[])
    # A build directory outlives the sources: an object whose source is gone is not in the module.
    return [path for path in newest if source_of(path).is_file()]


def source_of(path: Path) -> Path:
    parts = path.parts
    return CSRC / Path(*parts[len(parts) - 1 - parts[::-1].index("csrc") + 1 :]).with_suffix("")


def level_of(path: Path) -> str:
    """The level whose flags a source is compiled with; sources outside an op are compiled with none."""
    stem = path.name.split(".")[0]
    return stem if stem in FORBIDDEN and path.parent.parent.name == "cpu" else "baseline"


@cache
def disassembly(path: Path, objdump: str = "objdump") -> str:
    command = [objdump, "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def above(level: str, text: str) -> list[str]:
    """What kinds of forbidden instructions the text holds, each with its first line."""
    found = []
    for kind in FORBIDDEN[level]:
        for match in re.finditer(rf"^.*(?:{MARKS[kind]}).*$", text, re.MULTILINE):
            if kind == "AVX-512 FP16" and F16C.search(match[0]):
                continue
            found.append(f"{kind}: {match[0].strip()}")
            break
    return found


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("  10:\tvaddps %xmm0,%xmm1,%xmm2", "baseline"),
        ("  10:\tpext   %rax,%rbx,%rcx", "baseline"),
        ("  10:\tpmulld %xmm0,%xmm1", "baseline"),
        ("  10:\tvaddps %ymm16,%ymm1,%ymm2", "avx2"),
        ("  10:\tvaddps %zmm0,%zmm1,%zmm2", "avx2"),
        ("  10:\tkmovd  %eax,%k1", "avx2"),
        ("  10:\tvdpbf16ps %zmm0,%zmm1,%zmm2", "avx512_vnni"),
        ("  10:\tvcvtneps2bf16 %zmm0,%ymm1", "avx512_vnni"),
        ("  10:\ttdpbssd %tmm0,%tmm1,%tmm2", "avx512_vnni"),
        ("  10:\tvaddph %zmm0,%zmm1,%zmm2", "avx512_bf16"),
        ("  10:\ttdpbssd %tmm0,%tmm1,%tmm2", "avx512_bf16"),
        ("  10:\tvdpbf16ps %zmm0,%zmm1,%zmm2", "amx"),
        ("  10:\tsdot\tv0.4s, v1.16b, v2.4b[0]", "baseline"),
        ("  10:\tldaddal\tw0, w1, [x2]", "baseline"),
        ("  10:\tfadd\tv0.8h, v1.8h, v2.8h", "baseline"),
        ("  10:\tsmmla\tv0.4s, v1.16b, v2.16b", "neon_dotprod"),
        ("  10:\tbfdot\tv0.4s, v1.8h, v2.8h", "neon_i8mm"),
        ("  10:\tfmla\tz0.s, p0/m, z1.s, z2.s", "neon_i8mm"),
    ],
)
def test_the_rules_see_instructions_above(line: str, level: str) -> None:
    assert above(level, f"0000 <f>:\n{line}\n")


def test_the_rules_let_a_level_have_its_own() -> None:
    assert not above("avx2", "\n  1:\tvcvtph2ps %xmm0,%ymm1\n  2:\tpext   %rax,%rbx,%rcx\n")
    assert not above("avx512_vnni", "\n  1:\tvcvtps2ph $0x0,%zmm0,%ymm1\n  2:\tvpdpbusd %zmm0,%zmm1,%zmm2\n")
    assert not above("avx512_bf16", "\n  1:\tvdpbf16ps %zmm0,%zmm1,%zmm2\n  2:\tvcvtne2ps2bf16 %zmm0,%zmm1,%zmm2\n")
    assert not above("amx", "\n  1:\tldtilecfg (%rax)\n  2:\ttdpbf16ps %tmm7,%tmm5,%tmm3\n")
    assert not above("baseline", "\n  1:\taddps  %xmm0,%xmm1\n  2:\tverr   %ax\n")
    assert not above("baseline", "\n  1:\tfmla\tv0.4s, v1.4s, v2.4s\n  2:\tfcvtl\tv0.4s, v1.4h\n")
    assert not above("baseline", "\n  1:\tldaxr\tw0, [x1]\n")
    assert not above("neon_dotprod", "\n  1:\tsdot\tv0.4s, v1.16b, v2.16b\n  2:\tldaddal\tw0, w1, [x2]\n")
    assert not above("neon_i8mm", "\n  1:\tsmmla\tv0.4s, v1.16b, v2.16b\n")


# What each level's objects hold of its own, so that the disassembly is real.
OWN = {
    "avx2": "VEX (AVX and later)", "avx512_vnni": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx": "AMX",
    "neon_i8mm": "I8MM",
}  # fmt: skip


def check_objects(objects: list[Path], expected: set[str], objdump: str) -> None:
    bad = {
        str(path.relative_to(ROOT)): kinds
        for path in objects
        if (kinds := above(level_of(path), disassembly(path, objdump)))
    }
    assert not bad
    assert {level_of(path) for path in objects} >= expected
    for path in objects:
        if kind := OWN.get(level_of(path)):
            assert re.search(MARKS[kind], disassembly(path, objdump)), f"{path.name} holds no {kind}"


@needs_native
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_no_object_holds_instructions_above_its_level() -> None:
    objects = object_files()
    if not objects:
        pytest.skip("no build/ directory beside the tests: the module was built elsewhere")
    x86, arm = {"baseline", "avx2", "avx512_vnni", "avx512_bf16", "amx"}, {"baseline", "neon_dotprod", "neon_i8mm"}
    check_objects(objects, x86 if X86 else arm, "objdump")


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-objdump") is None, reason="no objdump for AArch64 is installed")
def test_no_cross_compiled_object_holds_instructions_above_its_level() -> None:
    objects = object_files("levels.dir", "build/aarch64/**")
    if not objects:
        pytest.skip("tools/cross_aarch64.sh has not been run")
    check_objects(objects, {"baseline", "neon_dotprod", "neon_i8mm"}, "aarch64-linux-gnu-objdump")


@needs_native
@pytest.mark.skipif(not X86, reason="the levels above baseline are of x86")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_amx_objects_multiply_tiles() -> None:
    """Bytes where x is quantized, bf16 pairs where it is kept; int4_linear and the peaks do both."""
    objects = [path for path in object_files() if level_of(path) == "amx"]
    if not objects:
        pytest.skip("no build/ directory beside the tests: the module was built elsewhere")
    for path in objects:
        op = path.parent.name
        products = {"int8_dynamic_linear": {"tdpbssd"}, "int4_linear": {"tdpbssd", "tdpbf16ps"}}
        wanted = products.get(op, {"tdpbssd", "tdpbf16ps"} if op == "peaks" else {"tdpbf16ps"})
        assert set(re.findall(r"\t(tdp\w+) ", disassembly(path))) == wanted, op


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_levels_share_no_inline_function() -> None:
    """A function that the linker may merge (weak) would run with the flags of whichever file it was taken from."""
    objects = [path for path in object_files() if level_of(path) != "baseline" or path.name.startswith("baseline")]
    if not objects:
        pytest.skip("no build/ directory beside the tests: the module was built elsewhere")
    for path in objects:
        text = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line[19:] for line in text.splitlines() if line[17:18] in "WV"]
        # DW.ref: an address that unwinding needs, data and the same in every file.
        mine = f"llmkern::{level_of(path)}::"
        foreign = [name for name in weak if mine not in name and not name.startswith("DW.ref.")]
        assert not foreign, f"{path.parent.name}/{path.name}"
