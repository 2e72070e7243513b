"""How much of what 2:4 pruning costs comes back: SmolLM2-135M, SparseGPT, then minutes of fine-tuning with its masks.

Every tuned row sees the same windows of the builtin text, in the same order, with the same optimizer; perplexity is
that of `bench.quality`. The text is of one kind, so the dense model gains from it too: what is closed of the gap is
measured against the dense model tuned on the same windows.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmkern
from bench.quality import protocol
from bench.results import write
from llmkern import data
from llmkern.distill import DistillWrapper
from llmkern.evaluate import perplexity
from llmkern.models import load_tokenizer
from llmkern.prune import MaskSet

WANTED = 1 / 3  # of the gap in log-perplexity
BATCH, LENGTH = 2, 512
WARMUP = 0.1  # of the steps


def training_windows(count: int) -> Tensor:
    """int64 [count, LENGTH] of the part of the text that is not evaluated."""
    ids = data.token_ids(load_tokenizer("smollm2"), data.builtin_text())
    return data.calibration_windows(ids, count, LENGTH, seed=1)


def pruned(dense: nn.Module, calibration: Tensor, folder: Path) -> nn.Module:
    """The dense model with the zeros of sparsegpt-2:4, as stock transformers loads it; `folder` may hold it already."""
    if not folder.exists():
        model = copy.deepcopy(dense)
        recipe = llmkern.Recipe.parse("sparsegpt-2:4", dtype="float32")
        llmkern.compress(model, recipe, calibration, progress=False)
        llmkern.save(model, folder, "dense")
    return AutoModelForCausalLM.from_pretrained(folder)


def tune(
    model: nn.Module, windows: Tensor, rate: float, teacher: nn.Module | None, ce_weight: float, masks: MaskSet | None
) -> float:
    """One pass over the windows in place, by cross-entropy or against a teacher; the seconds it took.

    The embeddings, which are the head too, stay: in so few steps Adam would move the rows of words that the windows
    do not even hold, by as much as all others.
    """
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    module = model if teacher is None else DistillWrapper(model, teacher, ce_weight=ce_weight)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    if masks is not None:
        masks.attach(optimizer)
    batches, start = windows.split(BATCH), time.perf_counter()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, len(batches)))
    module.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):  # the weights and what the optimizer keeps of them stay fp32
            loss = module(input_ids=batch, labels=batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    if masks is not None:
        masks.detach()
    return time.perf_counter() - start


def _share(step: int, steps: int) -> float:
    """Of the rate: up in a few steps, then down to 0 along a line."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, default=120, help=f"of {LENGTH} tokens to tune on (%(default)s)")
    parser.add_argument("--rate", type=float, default=3e-5, help="highest learning rate (%(default)s)")
    parser.add_argument("--ce-weight", type=float, default=1.0, help="beside the divergence (%(default)s)")
    parser.add_argument(
        "--pruned", metavar="FOLDER", help="what an earlier run pruned, or is to keep (default: neither)"
    )
    parser.add_argument("--out", default="recovery", help="bench/results/OUT.json (%(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    dense, calibration, evaluation, tokens = protocol()
    windows = training_windows(args.windows)
    rows: list[dict[str, Any]] = []

    def add(name: str, model: nn.Module, seconds: float = 0.0, masks: MaskSet | None = None) -> float:
        value = perplexity(model, evaluation).value
        row = {"model": name, "perplexity": round(value, 3), "tuning_seconds": round(seconds, 1)}
        if masks is not None:
            masks.check("2:4")
            row |= {"pattern": masks.pattern, "sparsity": masks.sparsity()}
        rows.append(row)
        print(f"{name:44}{value:8.3f}  {seconds:6.1f} s", file=sys.stderr, flush=True)
        return value

    add("dense", dense)
    tuned = copy.deepcopy(dense)
    best = add("dense, tuned", tuned, tune(tuned, windows, args.rate, None, 0.0, None))
    with tempfile.TemporaryDirectory() as folder:
        sparse = pruned(dense, calibration, Path(args.pruned or Path(folder) / "sparse"))
    worst = add("sparsegpt-2:4", sparse, masks=MaskSet.from_model(sparse))
    found: dict[str, nn.Module] = {}
    for name, teacher, ce_weight in (
        ("2:4, tuned", None, 0.0),
        ("2:4, distilled from dense", dense, args.ce_weight),
        ("2:4, distilled from dense, tuned", tuned, args.ce_weight),
    ):
        model = copy.deepcopy(sparse)
        masks = MaskSet.from_model(model)
        value = add(name, model, tune(model, windows, args.rate, teacher, ce_weight, masks), masks)
        closed = math.log(worst / value) / math.log(worst / best)
        rows[-1] |= {"gap_closed": round(closed, 3), "wanted": round(WANTED, 3), "met": closed >= WANTED}
        found[name] = model
    for name, model in found.items():
        # What 2:4 is for: two values of four and their places, on the kernels that run here.
        report = llmkern.patch(model, llmkern.Recipe.parse("pack-2:4", dtype="float32"))
        add(f"{name}, packed", model)
        rows[-1] |= {"linear_bytes": report.totals["linear_bytes_after"], "kernel": report.rows[0].kernel}
    about: dict[str, Any] = {
        "windows": args.windows,
        "length": LENGTH,
        "batch": BATCH,
        "rate": args.rate,
        "ce_weight": args.ce_weight,
    }
    about["autocast"] = "bfloat16"
    write(args.out, {"tokens": tokens, "tuning": about, "rows": rows})


if __name__ == "__main__":
    main()
