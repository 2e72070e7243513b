"""What each improvement of the solvers is worth: perplexity of SmolLM2-135M on the windows of bench.quality.

From the published algorithm to the default, one step at a time. `tokens` weights the tokens of the layers' Hessians by
what the model's output feels, `outputs` couples the rows; "model" is both. What follows the columns there, scales and
codes in turn, is shown apart, and so is what a layer makes up for of the errors in its input.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import llmkern
from bench.quality import protocol
from bench.results import write
from llmkern.evaluate import perplexity
from llmkern.fisher import Sensitivity

EVERYTHING = "tokens, outputs, scales, codes"
INPUTS = EVERYTHING + ", inputs"
PUBLISHED = {"act_order": "dynamic", "clip": None}
# (what it is, fields of the recipe, the parts of what "model" does that are used)
STEPS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "gptq-int3-g64": [
        ("published", PUBLISHED, ""),
        ("static groups in activation order", {"clip": None, "objective": "layer"}, ""),
        ("clip by squared error", {"clip": "mse", "objective": "layer"}, ""),
        ("clip weighted by diag(V)²", {"objective": "layer"}, ""),
        ("clip weighted by diag(V)², inputs corrected", {"objective": "layer"}, "inputs"),
        ("clip weighted by diag(V)², inputs corrected whole", {"objective": "layer", "input_correction": 1}, "inputs"),
        ("tokens", {}, "tokens"),
        ("outputs", {}, "outputs"),
        ("model", {}, "tokens and outputs"),
        ("model, scales refit", {}, "tokens, outputs, scales"),
        ("model, scales and codes in turn", {}, EVERYTHING),
        ("model, inputs corrected", {}, INPUTS),
    ],
    "gptq-int4": [
        ("clip weighted by diag(V)²", {"objective": "layer"}, ""),
        ("model", {}, EVERYTHING),
        ("model, inputs corrected", {}, INPUTS),
    ],
    "gptq-int4-g64": [
        ("clip weighted by diag(V)²", {"objective": "layer"}, ""),
        ("model", {}, EVERYTHING),
        ("model, inputs corrected", {}, INPUTS),
    ],
    "sparsegpt-2:4": [
        ("published", {"refit": False}, ""),
        ("mask by ADMM, refit", {"objective": "layer"}, ""),
        ("tokens", {}, "tokens"),
        ("outputs", {}, "outputs"),
        ("model", {}, "tokens and outputs"),
        ("model, inputs corrected", {}, "tokens, outputs, inputs"),
    ],
    "sparsegpt-0.5": [
        ("published", {"refit": False}, ""),
        ("mask by ADMM, refit", {"objective": "layer"}, ""),
        ("model", {}, "tokens and outputs"),
        ("model, inputs corrected", {}, "tokens, outputs, inputs"),
    ],
}


@contextmanager
def only(parts: str) -> Iterator[None]:
    """Inside, `compress` uses these parts of what it knows of the model's output."""
    weights = Sensitivity.weights if "tokens" in parts else lambda self, batch: {}
    take = Sensitivity.take if "outputs" in parts else lambda self, name: None
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Sensitivity, "weights", weights))
        patches.enter_context(mock.patch.object(Sensitivity, "take", take))
        yield


def left_out(recipe: str, parts: str) -> dict[str, int]:
    """Fields of a recipe that leave out the steps of a default one that are not among these parts."""
    known = llmkern.Recipe.parse(recipe)
    steps = {"input_correction": "inputs"} | ({"descent": "codes", "scale_refit": "scales"} if known.bits else {})
    return {field: 0 for field, part in steps.items() if part not in parts}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(STEPS)} (all)")
    parser.add_argument("--steps", metavar="STEP", nargs="+", help="only these steps of the recipes (all)")
    parser.add_argument("--out", default="ablation", help="bench/results/OUT.json (%(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.recipes) - set(STEPS):
        parser.error(f"unknown recipe {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    dense, calibration, evaluation, tokens = protocol()
    rows = []
    for name in args.recipes or STEPS:
        for step, fields, parts in STEPS[name]:
            if args.steps and step not in args.steps:
                continue
            model, start = copy.deepcopy(dense), time.perf_counter()
            with only(parts):
                recipe = llmkern.Recipe.parse(name, **left_out(name, parts), **fields)
                llmkern.compress(model, recipe, calibration, progress=False)
            seconds, value = time.perf_counter() - start, perplexity(model, evaluation).value
            row = {"recipe": name, "step": step, "perplexity": round(value, 3), "compress_seconds": round(seconds, 1)}
            rows.append(row)
            write(args.out, {"tokens": tokens, "rows": rows})  # each row takes minutes
            print(f"{name:16} {step:36}{value:8.3f}  {seconds:6.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
