"""Peak memory of `compress` on a folder, above what the process had before it opened the model; `test_plan` runs it."""

import gc
import json
import sys
from pathlib import Path

import tiny
from transformers import AutoModelForCausalLM

import llmkern

PROC = Path("/proc/self")


def memory(name):
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


folder, recipe, samples = sys.argv[1:]
# What is loaded at first use is no part of the peak; nor is what the first compression of all takes for good.
llmkern.compress(tiny.llama(), recipe, tiny.token_ids(), progress=False)
ids = tiny.token_ids(int(samples), 512)
gc.collect()
(PROC / "clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
model = AutoModelForCausalLM.from_pretrained(folder).eval()
llmkern.compress(model, recipe, ids, progress=False)
print(json.dumps({"peak": memory("VmHWM") - before}))
