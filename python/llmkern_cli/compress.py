"""`llmkern compress`: prune and quantize a model, block by block, and save it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkern_cli import plan
from llmkern_cli._common import (
    Number,
    UsageError,
    calibration_arguments,
    progress,
    quiet_transformers,
    recipe_of,
    refuse_foreign,
    resume,
    state_folder,
)

if TYPE_CHECKING:
    from llmkern.report import Report

NAME = "compress"
HELP = "Prune and quantize a model, and save it."
SHARE = 0.5  # of the available memory: calibration and the solvers want the rest


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a hub id, or smollm2")
    parser.add_argument("--recipe", required=True, metavar="R", help="a short form such as gptq-int4-g128, or a file")
    parser.add_argument("--out", metavar="DIR", type=Path, help="a new folder, or one of ours")
    calibration_arguments(parser)
    parser.add_argument(
        "--experts", choices=("routed", "all"),
        help="of a mixture: calibrate each expert from the tokens routed to it, or from all (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--objective", choices=("model", "layer"),
        help="what an error of a layer is measured by: what it does to the model's outputs, which takes a backward "
        "pass, or the layer's own squared error (default: the recipe's, which is model for gptq and sparsegpt)",
    )  # fmt: skip
    parser.add_argument(
        "--input-correction", type=float, metavar="STRENGTH",
        help="how much of what the layers before it have changed a layer makes up for, 0 to 1; 0 saves a hidden state "
        "per sample, and the dense model's forwards (default: the recipe's, which is 0.5 for gptq and sparsegpt)",
    )  # fmt: skip
    parser.add_argument(
        "--stream", choices=("auto", "on", "off"), default="auto",
        help="leave a folder's weights in its files, but for one block at a time (auto: when they would take more than "
        "half of the memory that is available, counted once for each rank of this machine)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done: `llmkern plan`")

    parser.add_argument("--strict", action="store_true", help="what the report calls a problem is an error")
    parser.add_argument("--resume", action="store_true", help="go on with the same run where it was killed, if it was")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """The report, and `out` and `seconds`; None on the ranks after the first; the plan of a dry run."""
    from llmkern.distributed import joined

    if args.dry_run:
        return plan.run(args)
    if args.out is None:
        raise UsageError("the following arguments are required: --out")
    with joined() as (rank, device):
        if rank == 0:
            return _run(args, device)
        try:
            model, _, windows = _load(args)
            _compress(args, model, windows, device)
        except Exception as error:  # the first rank reports; its stdout is the one that is read
            raise SystemExit(f"llmkern compress: rank {rank}: {error}") from error
        return None


def _run(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """As the first rank, or the only one: refuses, compresses and saves."""
    import llmkern

    # All that can be refused is refused before the first long step.
    recipe_of(args)
    refuse_foreign(args.out)
    state = resume(args.out, args.resume)
    model, tokenizer, windows = _load(args)
    start = time.perf_counter()
    report = _compress(args, model, windows, device)
    llmkern.save(model, args.out, tokenizer=tokenizer, report=report)
    shutil.rmtree(state, ignore_errors=True)
    for line in report.problem_lines():
        progress(line)
    return {**json.loads(report.to_json()), "out": str(args.out), "seconds": time.perf_counter() - start}


def _load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the windows if the recipe needs any."""
    from llmkern import data
    from llmkern.models import load_model, open_streamed

    streamed = _streamed(args.model, args.stream, recipe_of(args))
    text = data.read_text(args.calibration)
    quiet_transformers()
    progress(f"streaming {args.model}, {streamed}" if streamed else f"loading {args.model}")
    model, tokenizer = open_streamed(args.model) if streamed else load_model(args.model)
    windows = None
    if recipe_of(args).needs_calibration:
        windows = data.calibration_windows(data.token_ids(tokenizer, text), args.samples, args.seqlen, args.seed)
    return model, tokenizer, windows


def _compress(args: argparse.Namespace, model: Any, windows: Any, device: Any) -> Report:
    import llmkern

    state = state_folder(args.out)
    return llmkern.compress(model, recipe_of(args), windows, device=device, state_dir=state, strict=args.strict)


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
    # Of a run's ranks each decides for itself: a model is the same streamed or not. But those of a machine all load it.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if asked == "off" or why_not or free is None or size * beside <= free * SHARE:
        return ""
    many = f" on each of {beside} ranks" if beside > 1 else ""
    return f"since it has {size / 1e9:.1f} GB{many} and {free / 1e9:.1f} GB of memory are available"


def show(result: dict[str, Any]) -> str:
    """Where the model and its report are."""
    if "out" not in result:
        return plan.show(result)
    problems = result["totals"]["problems"]
    warning = f"; {problems} problems in it (--strict makes them errors)" if problems else ""
    where = f"per-layer report: {result['out']}/report.html"
    return f"{result['out']}: saved in {Number(result['seconds'], 1)} s; {where}{warning}"
