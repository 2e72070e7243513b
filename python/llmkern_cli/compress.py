"""`llmkern compress`: prune and quantize a model, block by block, and save it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from llmkern_cli import plan
from llmkern_cli._common import (
    Number,
    UsageError,
    at_least,
    compress_into,
    parse_recipe,
    progress,
    quiet_transformers,
    refuse_foreign,
)

NAME = "compress"
HELP = "Prune and quantize a model, and save it."
SHARE = 0.5  # of the available memory: calibration and the solvers want the rest


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or smollm2")
    parser.add_argument("--recipe", required=True, metavar="R", help="a short form such as gptq-int4-g128, or a file")
    parser.add_argument("--out", metavar="DIR", type=Path, help="a new folder, or one of ours")
    parser.add_argument(
        "--calibration", default="builtin", metavar="builtin|FILE|hf:NAME", help="its first three quarters are used"
    )
    parser.add_argument("--samples", type=at_least(1), default=128, metavar="N", help="windows (%(default)s)")
    parser.add_argument("--seqlen", type=at_least(2), default=512, metavar="L", help="tokens per window (%(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="of the windows' starts (%(default)s)")
    parser.add_argument(
        "--stream", choices=("auto", "on", "off"), default="auto",
        help="leave a folder's weights in its files, but for one block at a time (auto: when they would take more than "
        "half of the memory that is available)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done: `llmkern plan`")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The report, and `out` and `seconds`; the plan of a dry run."""
    from llmkern import data
    from llmkern.models import load_model, open_streamed

    if args.dry_run:
        return plan.run(args)
    if args.out is None:
        raise UsageError("the following arguments are required: --out")
    # All that can be refused is refused before the first long step.
    recipe = parse_recipe(args.recipe)
    refuse_foreign(args.out)
    text = data.read_text(args.calibration)
    quiet_transformers()
    streamed = _streamed(args.model, args.stream, recipe)
    progress(f"streaming {args.model}, {streamed}" if streamed else f"loading {args.model}")
    model, tokenizer = open_streamed(args.model) if streamed else load_model(args.model)
    windows = None
    if recipe.needs_calibration:
        windows = data.calibration_windows(data.token_ids(tokenizer, text), args.samples, args.seqlen, args.seed)
    start = time.perf_counter()
    report = compress_into(args.out, model, tokenizer, recipe, windows)
    return {**json.loads(report.to_json()), "out": str(args.out), "seconds": time.perf_counter() - start}


def _streamed(name: str, asked: str, recipe: Any) -> str:
    """Why the model should be streamed; empty if it should not. UsageError when it is asked for and cannot be."""
    from llmkern._memory import available

    files = list(Path(name).expanduser().glob("*.safetensors")) if name != "smollm2" else []
    why_not = (
        "only a local folder of safetensors can be" if not files
        else f"{recipe} changes the whole model" if recipe.method == "cast"
        else "its layers are packed already" if (Path(name).expanduser() / "llmkern.json").is_file()
        else ""
    )  # fmt: skip
    if asked == "on" and why_not:
        raise UsageError(f"--stream on: {name} cannot be streamed: {why_not}")
    if asked == "on":
        return "as asked for"
    size, free = sum(path.stat().st_size for path in files), available()
    if asked == "off" or why_not or free is None or size <= free * SHARE:
        return ""
    return f"since it has {size / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are available"


def show(result: dict[str, Any]) -> str:
    """Where the model and its report are."""
    if "out" not in result:
        return plan.show(result)
    return f"{result['out']}: saved in {Number(result['seconds'], 1)} s; per-layer report: {result['out']}/report.html"
