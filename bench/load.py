"""Loading SmolLM2 packed: peak extra memory against its packed bytes, and seconds against loading it dense.

Each load is a fresh process, repeated; files are in the system's cache. `extra_mb` is the most resident memory (VmHWM)
from before the load until it is done, less what the process had with its libraries imported; `packed_mb` is what the
loaded model's tensors take. transformers maps files and reads no weight until it is used, so `ready_s` and `ready_mb`
are those until the logits of eight tokens are there. The folders are ordinary checkpoints: llmkern.json is taken out,
but for the row `llmkern`. Memory does not depend on how busy the machine is, and little the seconds of the processor
(`load_cpu_s`, of all threads); the others do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import llmkern
from bench.results import write
from llmkern.models import load_model

RECIPE = "rtn-int4-g64"
MEMORY_GOAL = 1.3  # peak extra memory, times the packed bytes
SHARD = "40MB"

CHILD = """
import gc, json, sys, time
from pathlib import Path
import torch, transformers
import llmkern
from llmkern.report import model_bytes

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

folder, how = sys.argv[1:]
transformers.LlamaForCausalLM, llmkern.load  # loaded at first use
from transformers import core_model_loading, conversion_mapping
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
if how == "dense":
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
else:
    model = llmkern.load(folder)
seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
cpu = time.process_time() - cpu
with torch.no_grad():
    logits = model(torch.arange(8)[None]).logits
ready, peak_ready = time.perf_counter() - start, memory("VmHWM") - before
assert torch.isfinite(logits).all()
print(json.dumps({
    "extra": peak, "ready_extra": peak_ready, "load": seconds, "ready": ready, "cpu": cpu, "bytes": model_bytes(model),
}))
"""


def folders(root: Path) -> dict[str, Path]:
    """Name of a row -> its folder."""
    model, _ = load_model("smollm2")
    model.to(torch.bfloat16)
    found = {"dense": root / "dense", "llmkern": root / "llmkern"}
    model.save_pretrained(found["dense"], max_shard_size=SHARD)
    llmkern.patch(model, llmkern.Recipe.parse(RECIPE, scale_dtype="float16"), keep_originals=False)
    llmkern.save(model, found["llmkern"])
    for layout in ("compressed-tensors", "gptq"):
        found[layout] = root / layout
        llmkern.save(model, found[layout], layout)
        (found[layout] / "llmkern.json").unlink()
    return found


def measure(folder: Path, how: str) -> dict[str, float]:
    """Bytes and seconds of one fresh process."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), how], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{how}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="fresh processes of each row (%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print the rows only")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    rows = []
    with tempfile.TemporaryDirectory(prefix="llmkern-load-") as temporary:
        found = folders(Path(temporary))
        runs: dict[str, list[dict[str, float]]] = {how: [] for how in found}
        for _ in range(args.repeats + 1):  # in turn, so that a busy moment hits all; the first fills the cache
            for how, folder in found.items():
                runs[how].append(measure(folder, how))
        dense = {kind: statistics.median(run[kind] for run in runs["dense"][1:]) for kind in ("load", "ready")}
        for how, own in runs.items():
            size = own[0]["bytes"]
            row: dict[str, object] = {"how": how, "packed_mb": round(size / 1e6, 1)}
            for key, name in (("extra", "extra_mb"), ("ready_extra", "ready_mb")):
                row[name] = round(max(run[key] for run in own[1:]) / 1e6, 1)
            row["extra_ratio"] = ratio = round(max(run["extra"] for run in own[1:]) / size, 3)
            for kind in ("load", "ready"):
                seconds = [run[kind] for run in own[1:]]
                row[f"{kind}_s"] = [round(f(seconds), 3) for f in (min, statistics.median, max)]
                row[f"{kind}_to_dense"] = round(statistics.median(seconds) / dense[kind], 3)
            row["load_cpu_s"] = round(statistics.median(run["cpu"] for run in own[1:]), 3)
            if how != "dense":
                row["memory_met"] = ratio <= MEMORY_GOAL
                row["time_met"] = row["load_to_dense"] < 1 and row["ready_to_dense"] < 1  # type: ignore[operator]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    if not args.no_write:
        write("load", {"recipe": RECIPE, "memory_goal": MEMORY_GOAL, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
