"""Write the README's tables from what they are true of: kernels.def, and the committed results.

`python tools/readme_tables.py` writes; tests/test_docs.py compares.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
GPU_ROWS = (
    "cuda.ring",
    "cuda.stream",
    "cuda.mma",
    "cuda.wgmma",
    "cuda.stream_int8",
    "cuda.mma_int8",
    "cuda.wgmma_int8",
    "cuda.block",
    "triton",
)


def built() -> dict[str, list[str]]:
    """Op -> the CPU levels its kernels.def names, lowest first; an op without one has only its reference."""
    ops = sorted(path.parent.name for path in (ROOT / "python/llmkern/ops").glob("*/reference.py"))
    found = {}
    for op in ops:
        rows = ROOT / "csrc/cpu" / op / "kernels.def"
        text = rows.read_text(encoding="utf-8") if rows.is_file() else ""
        found[op] = re.findall(r"^LLMKERN_KERNEL\((\w+)\)", text, re.MULTILINE)
    return found


def built_for_gpu() -> dict[str, list[str]]:
    """Op -> its GPU rows: the kernels of csrc/cuda, those that quantize x with a suffix, and `triton`."""
    found = {}
    for op in built():
        found[op] = []
        for file, suffix in (("kernels.def", ""), ("int8_kernels.def", "_int8")):
            rows = ROOT / "csrc/cuda" / op / file
            text = rows.read_text(encoding="utf-8") if rows.is_file() else ""
            names = re.findall(r"^LLMKERN_KERNEL\((\w+)\)", text, re.MULTILINE)
            found[op] += [f"cuda.{kernel}{suffix}" for kernel in names]
        if (ROOT / "python/llmkern/ops" / op / "triton.py").is_file():
            found[op].append("triton")
    return found


def levels() -> list[str]:
    """Every level of levels.def, lowest first."""
    text = (ROOT / "csrc/common/levels.def").read_text(encoding="utf-8")
    return re.findall(r"^LLMKERN_LEVEL\((\w+),", text, re.MULTILINE)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kernels_table() -> str:
    """Op x level."""
    ops = built()
    columns = [level for level in levels() if any(level in names for names in ops.values())]
    rows = [[f"`{op}`"] + ["yes" if level in names else "" for level in columns] for op, names in ops.items()]
    return table(["op", *(f"`cpu.{level}`" for level in columns)], rows)


def gpu_table() -> str:
    """Op x GPU row."""
    ops = built_for_gpu()
    columns = sorted({row for rows in ops.values() for row in rows}, key=GPU_ROWS.index)
    rows = [[f"`{op}`"] + ["yes" if column in names else "" for column in columns] for op, names in ops.items()]
    return table(["op", *(f"`{column}`" for column in columns)], rows)


def results() -> str:
    """What has been measured, file by file; a file that is not there gives no words."""
    parts = [section(read(name)) for name, section in SECTIONS if (RESULTS / f"{name}.json").is_file()]
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def read(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def where(result: dict[str, Any]) -> str:
    """Machine and commit of a result."""
    machine = result["machine"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    return f"{machine['cpu']}, {threads}, torch {machine['torch']}, commit {machine['commit']}"


def quality(result: dict[str, Any]) -> str:
    """The perplexities."""
    rows = [
        [f"`{row['recipe']}`", f"{row['perplexity']:.2f}", f"{row['wanted']:.2f}", f"{row['papers']:.2f}"]
        for row in result["rows"]
    ]
    head = "Perplexity of SmolLM2-135M on CPython's documentation, calibrated with 32 windows of 512 tokens"
    header = ["recipe", "here", "goal", "the published algorithm"]
    later = ", but for rows with a commit of their own" if any("commit" in row for row in result["rows"]) else ""
    return f"{head} (`bench/results/quality.json`; {where(result)}{later}):\n\n{table(header, rows)}"


def demo(result: dict[str, Any]) -> str:
    """The demo's table."""
    rows = [
        [
            f"`{row['recipe']}`",
            f"{row['perplexity']:.2f}",
            f"{row['linear_bytes'] / 1e6:.1f}",
            f"{row['model_bytes'] / 1e6:.1f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['compress_seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    header = ["recipe", "perplexity", "linear MB", "model MB", "prefill tok/s", "decode tok/s", "compress s"]
    head = f"`make demo`, calibrated with {result['samples']} windows of {result['seqlen']} tokens"
    return f"{head} (`bench/results/demo.json`; {where(result)}):\n\n{table(header, rows)}"


GPU_OPS = (
    ("int4_linear", "kept", "int4, groups of 128"),
    ("int8_linear", "kept", "int8"),
    ("int8_dynamic_linear", "int8 per row", "int8, x quantized to int8"),
    ("sparse24_linear", "kept", "2:4, bf16"),
    ("sparse24_int4_linear", "kept", "2:4 int4, groups of 128"),
)
GPU_MS = (1, 16, 64, 128, 1024, 4096)


def gpu(result: dict[str, Any]) -> str:
    """Dense torch's time over ours, from the worst to the best of the shapes that were reached."""
    timed = [row for row in result["rows"] if row["median_us"] and not row["forced"]]
    shapes = sorted({(row["n"], row["k"]) for row in timed if row["m"] in GPU_MS})
    rows = []
    for op, activations, words in GPU_OPS:
        line = [f"`{op}` ({words})"]
        for m in GPU_MS:
            ours = [
                1 / row["ratio_to_dense"]
                for row in timed
                if (row["op"], row["activations"], row["m"]) == (op, activations, m) and row["kernel"]
            ]
            line.append(" to ".join(dict.fromkeys(f"{edge(ours):.2f}" for edge in (min, max))) if ours else "")
        rows.append(line)
    machine = result["machine"]
    head = (
        f"On one {machine['gpu']['name']}, the time of torch's dense bf16 product over ours, by rows of x, for N x K = "
        f"{', '.join(f'{n} x {k}' for n, k in shapes)} (`bench/results/gpu.json`; `gpu.md` has all peers, and "
        f"the goals that are not met; torch {machine['torch']}, commit {machine['commit']})"
    )
    return f"{head}:\n\n{table(['op', *(f'M = {m}' for m in GPU_MS)], rows)}"


SECTIONS = (("quality", quality), ("demo", demo), ("gpu", gpu))


def rendered(text: str) -> str:
    """The README with its tables as they should be."""
    for name, body in (("kernels", kernels_table()), ("gpu kernels", gpu_table()), ("results", results())):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = text.split(start)
        text = f"{head}{start}\n\n{body}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
