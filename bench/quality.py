"""Perplexity of SmolLM2-135M after each recipe: 32 calibration windows and 16 evaluation windows of 512 tokens.

`papers` is what the published algorithm gives in plain PyTorch on the same windows, `wanted` our goal. The sparse and
quantized models run as they are packed, on the kernels that run here.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

import llmkern
from bench.results import write
from llmkern import data
from llmkern.evaluate import perplexity
from llmkern.models import load_model

# recipe: (papers, wanted)
GOALS = {
    "dense": (12.00, 12.00),
    "rtn-int8": (12.05, 12.06),
    "gptq-int4-g64": (15.30, 12.7),
    "gptq-int4": (18.88, 13.4),
    "gptq-int3-g64": (34.1, 16.0),
    "sparsegpt-0.5": (17.49, 15.2),
    "sparsegpt-2:4": (27.2, 19.5),
    "sparsegpt-2:4-int4-g64": (34.7, 21.5),
}


def protocol() -> tuple[Any, Tensor, Tensor, int]:
    """The dense model, its calibration and evaluation windows, and how many tokens the text has."""
    model, tokenizer = load_model("smollm2")
    ids = data.token_ids(tokenizer, data.builtin_text())
    return model, data.calibration_windows(ids, 32, 512), data.evaluation_windows(ids, 16, 512), len(ids)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(GOALS)} (all)")
    parser.add_argument("--out", default="quality", help="bench/results/OUT.json (%(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.recipes) - set(GOALS):
        parser.error(f"unknown recipe {', '.join(sorted(unknown))}; known: {', '.join(GOALS)}")
    dense, calibration, evaluation, tokens = protocol()
    rows = []
    for recipe in args.recipes or GOALS:
        papers, wanted = GOALS[recipe]
        model, start = copy.deepcopy(dense), time.perf_counter()
        if recipe != "dense":
            windows = calibration if llmkern.Recipe.parse(recipe).needs_calibration else None
            llmkern.compress(model, recipe, windows, progress=False)
        seconds, value = time.perf_counter() - start, perplexity(model, evaluation).value
        rows.append({
            "recipe": recipe, "perplexity": round(value, 3), "papers": papers, "wanted": wanted,
            "met": round(value, 2) <= wanted, "compress_seconds": round(seconds, 1),
        })  # fmt: skip
        print(f"{recipe:24}{value:8.3f}  wanted {wanted:6.2f}  {seconds:6.1f} s", file=sys.stderr, flush=True)
    write(args.out, {"tokens": tokens, "rows": rows})


if __name__ == "__main__":
    main()
