"""`llmkern prune`: a model with weights set to 0, or without some of its channels, heads and blocks."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkern_cli._common import (
    Number,
    UsageError,
    at_least,
    calibration_arguments,
    megabytes,
    progress,
    quiet_transformers,
    refuse_foreign,
    resume,
)

if TYPE_CHECKING:
    from llmkern.recipe import Recipe

NAME = "prune"
HELP = (
    "Set weights to 0 (--sparsity), or remove channels, heads and blocks (--mlp, --kv-groups, --heads, --blocks). "
    "The result is dense and loads in stock transformers; `llmkern compress` packs zeros."
)
ZEROS = ("sparsegpt", "wanda", "magnitude")  # the first is the default
STRUCTURED = ("obs", "wanda", "magnitude")
PARTS = ("mlp", "kv_groups", "heads", "blocks")
STEPS = ("plan", "apply")  # of removing parts: each has a state of its own


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a hub id, or smollm2")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="a new folder, or one of ours")
    parser.add_argument(
        "--method", choices=sorted({*ZEROS, *STRUCTURED}),
        help=f"which weights go: {', '.join(ZEROS)} with --sparsity; {', '.join(STRUCTURED)} else (default: the first)",
    )  # fmt: skip
    parser.add_argument("--sparsity", metavar="S", help="the share of zeros in every linear layer, as 0.5, or 2:4")
    parser.add_argument(
        "--scope", choices=("layer", "global"), default="layer",
        help="with --method magnitude: the share is of each layer, or of all together (%(default)s)",
    )  # fmt: skip
    sizes = {
        "mlp": "channels of every MLP", "kv-groups": "key-value heads, with their query heads",
        "heads": "query heads in all", "blocks": "blocks",
    }  # fmt: skip
    for name, what in sizes.items():
        parser.add_argument(f"--{name}", type=_size, metavar="KEEP", help=f"{what} to keep: a share (0.75) or a number")
    parser.add_argument(
        "--multiple-of", type=at_least(1), default=64, metavar="N", help="of the channels that stay (%(default)s)"
    )
    calibration_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the same run where it was killed, if it was")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What was pruned, `out` and `seconds`."""
    from llmkern import data
    from llmkern.models import load_model

    # All that can be refused is refused before the first long step.
    recipe, sizes, method = _asked(args)
    if args.out.expanduser().resolve() == Path(args.model).expanduser().resolve():
        raise UsageError(f"--out {args.out}: it is the folder that is read; name another")
    refuse_foreign(args.out)
    state = resume(args.out, args.resume, STEPS if recipe is None else ())
    needs_data = True if recipe is None else recipe.needs_calibration
    text = data.read_text(args.calibration) if needs_data else ""
    quiet_transformers()
    progress(f"loading {args.model}")
    model, tokenizer = load_model(args.model)
    windows = None
    if needs_data:
        windows = data.calibration_windows(data.token_ids(tokenizer, text), args.samples, args.seqlen, args.seed)
    start = time.perf_counter()
    if recipe is None:
        result = _remove(args, model, tokenizer, windows, sizes, method, state)
    else:
        result = _set_to_zero(args, model, tokenizer, windows, recipe, state)
    return {**result, "method": method, "out": str(args.out), "seconds": time.perf_counter() - start}


def show(result: dict[str, Any]) -> str:
    """Where the model is, and what is left of it."""
    if "sparsity" in result:
        what = f"{result['sparsity']:.1%} of the weights of {len(result['sparsities'])} linear layers are 0"
    else:
        before, after = result["parameters_before"], result["parameters_after"]
        what = f"{after:,} of {before:,} parameters"
    size = megabytes(result["model_bytes_after"])
    return f"{result['out']}: {result['method']}: {what}; {size} MB; saved in {Number(result['seconds'], 1)} s"


def _size(text: str) -> float:
    """A number to keep, or a share in (0, 1)."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a share such as 0.75, or a whole number, got {text!r}") from None
    if not (0 < value < 1 or (isinstance(value, int) and value > 0)):
        raise argparse.ArgumentTypeError(f"wanted a share in (0, 1) or a number of at least 1, got {text!r}")
    return value


def _asked(args: argparse.Namespace) -> tuple[Recipe | None, dict[str, float], str]:
    """The recipe for zeros or, where there is none, what to keep of which parts; and the method of either."""
    from llmkern.recipe import Recipe

    sizes = {name: size for name in PARTS if (size := getattr(args, name)) is not None}
    if (args.sparsity is None) == (not sizes):
        raise UsageError("give either --sparsity or some of --mlp, --kv-groups, --heads, --blocks")
    kind, methods = ("--sparsity", ZEROS) if not sizes else ("--mlp, --kv-groups, --heads, --blocks", STRUCTURED)
    method = args.method or methods[0]
    if method not in methods:
        raise UsageError(f"--method {method}: with {kind} it is one of {', '.join(methods)}")
    if args.scope == "global" and (method != "magnitude" or sizes or ":" in args.sparsity):
        raise UsageError("--scope global goes with --method magnitude and a share: only |w| compares between layers")
    if sizes:
        return None, sizes, method
    sparsity = args.sparsity
    if ":" not in sparsity:
        try:
            sparsity = float(sparsity)
        except ValueError:
            raise UsageError(f"--sparsity: wanted a share such as 0.5, or n:m, got {args.sparsity!r}") from None
    try:
        return Recipe(method=method, sparsity=sparsity), {}, method
    except ValueError as error:
        raise UsageError(f"--sparsity {args.sparsity}: {error}") from error


def _set_to_zero(
    args: argparse.Namespace, model: Any, tokenizer: Any, windows: Any, recipe: Recipe, state: Path
) -> dict[str, Any]:
    """Prune through `compress`, whose packed layers say where the zeros are, and save them as dense weights."""
    from dataclasses import replace

    import llmkern
    from llmkern.nn import PackedLinear
    from llmkern.prune import magnitude_
    from llmkern.saved_layers import model_dtype

    if args.scope == "global":
        magnitude_(model, float(args.sparsity), scope="global")
        recipe = replace(recipe, method="pack", sparsity=None)
    # Values in the model's own dtype: none is rounded on the way.
    recipe = replace(recipe, dtype=str(model_dtype(model)).removeprefix("torch."))
    report = llmkern.compress(model, recipe, windows, state_dir=state)
    zeros = {
        name: int((layer.unpack() == 0).sum())
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLinear)
    }
    for row in report.rows:
        row.kernel, row.bytes_after = "torch", row.bytes_before
    report.model_bytes_after = report.model_bytes_before
    report.notes.append("written as dense weights, zeros in place")
    if args.scope == "global":
        report.notes.append(f"magnitude {args.sparsity} of all layers together, by one threshold")
    llmkern.save(model, args.out, "dense", tokenizer=tokenizer, report=report)
    shutil.rmtree(state, ignore_errors=True)
    for line in report.problem_lines():
        progress(line)
    size = {row.name: row.shape[0] * row.shape[1] for row in report.rows}
    return {
        **json.loads(report.to_json()),
        "sparsity": sum(zeros.values()) / sum(size.values()),
        "sparsities": {name: count / size[name] for name, count in zeros.items()},
    }


def _remove(
    args: argparse.Namespace, model: Any, tokenizer: Any, windows: Any, sizes: dict[str, float], method: str,
    state: Path,
) -> dict[str, Any]:  # fmt: skip
    """A smaller model, what remains restored by least squares on the calibration."""
    import llmkern
    from llmkern.prune import StructuredReport, apply_structured, plan_structured
    from llmkern.report import model_bytes

    plan_state, apply_state = (state / step for step in STEPS)
    asked: dict[str, Any] = {"method": method, "multiple_of": args.multiple_of, **sizes}
    report = StructuredReport()
    try:
        plan = plan_structured(model, windows, **asked, state_dir=plan_state)
        small = apply_structured(model, plan, calibration=windows, report=report, state_dir=apply_state)
    finally:
        with contextlib.suppress(OSError):  # something is kept in it, or it was never made
            state.rmdir()
    llmkern.save(small, args.out, "dense", tokenizer=tokenizer)
    shutil.rmtree(state, ignore_errors=True)
    return {
        **report.to_dict(),
        "plan": plan.to_dict(),
        "model_bytes_before": model_bytes(model),
        "model_bytes_after": model_bytes(small),
    }
