"""Peak memory of `compress` on SmolLM2 (fp32, a folder of several files), whole and streamed, in fresh processes.

`peak_mb` is the most resident memory (VmHWM) from before the model is opened until it is saved, less what the process
had then with its libraries imported (`imports_mb`), and `planned_mb` what `llmkern plan` expects of it. Resident pages
of mapped files count. Memory does not depend on how busy the machine is; the seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.results import write
from llmkern.models import load_model
from llmkern.planning import plan
from llmkern.report import model_bytes

RECIPES = ("gptq-int4-g64", "sparsegpt-2:4-int4-g64")
# Beyond the dense model (the whole of it, or streamed), in MB.
GOALS = {"whole": 1500, "streamed": 1000}
SHARD = "100MB"

CHILD = """
import gc, json, sys, time
from pathlib import Path
import torch, transformers
import llmkern
from llmkern import data, planning
from llmkern.models import load_model, load_tokenizer, open_streamed

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

folder, recipe, mode, samples, out = sys.argv[1:]
tokenizer = load_tokenizer(folder)
windows = data.calibration_windows(data.token_ids(tokenizer, data.builtin_text()), int(samples), 512)
transformers.LlamaForCausalLM, llmkern.compress, llmkern.save  # loaded at first use
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
imports, start = memory("VmRSS"), time.perf_counter()
model = load_model(folder).model if mode == "whole" else open_streamed(folder).model
opened = memory("VmHWM")
report = llmkern.compress(model, recipe, windows, progress=False)
compressed = memory("VmHWM")
llmkern.save(model, out, report=report)
print(json.dumps({
    "imports": imports, "opened": opened - imports, "compressed": compressed - imports,
    "peak": memory("VmHWM") - imports, "seconds": time.perf_counter() - start,
    "loss": report.totals["mean_loss"],
}))
"""


def measure(folder: Path, recipe: str, mode: str, samples: int, out: Path) -> dict[str, float]:
    """Bytes and seconds of one fresh process."""
    command = [sys.executable, "-c", CHILD, str(folder), recipe, mode, str(samples), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{recipe}, {mode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens (%(default)s)")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    rows = []
    with tempfile.TemporaryDirectory(prefix="llmkern-memory-") as temporary:
        folder = Path(temporary) / "dense"
        model, tokenizer = load_model("smollm2")
        dense = model_bytes(model)
        model.save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
        plans = {r: plan(model, r, samples=args.samples, seqlen=512) for r in args.recipes or RECIPES}
        del model
        for recipe, planned in plans.items():
            expected = {"whole": planned.peak_bytes, "streamed": planned.peak_bytes_streamed or 0}
            for mode, goal in GOALS.items():
                found = measure(folder, recipe, mode, args.samples, Path(temporary) / "out")
                row = {
                    "recipe": recipe, "mode": mode, "dense_mb": round(dense / 1e6),
                    **{f"{key}_mb": round(found[key] / 1e6) for key in ("imports", "opened", "compressed", "peak")},
                    "planned_mb": round(expected[mode] / 1e6),
                    "limit_mb": round(dense / 1e6) + goal, "met": found["peak"] <= dense + goal * 1e6,
                    "seconds": round(found["seconds"], 1), "mean_loss": found["loss"],
                }  # fmt: skip
                rows.append(row)
                write("memory", {"samples": args.samples, "rows": rows})  # each row takes minutes
                text = f"{recipe:24}{mode:10}{row['peak_mb']:6} MB, limit {row['limit_mb']}"
                print(f"{text}, planned {row['planned_mb']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
