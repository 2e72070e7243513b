"""`llmkern convert`: a checkpoint in another format, every weight the same value."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from llmkern_cli._common import UsageError, megabytes, parse_recipe, progress, quiet_transformers, refuse_foreign

NAME = "convert"
HELP = "Write a checkpoint in another format, every weight the same value; refuses what the format cannot hold."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a model folder, ours or another's, or a GGUF file")
    parser.add_argument("--format", required=True, choices=("compressed-tensors", "gptq", "dense"), help="to write")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="a new folder, or one of ours")
    parser.add_argument(
        "--recipe", metavar="R", help="new codes instead of the same values, by a recipe that needs no data"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of dense weights (default: the checkpoint's)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Where it is, its layers and bytes."""
    import torch

    import llmkern
    from llmkern import converting, loading
    from llmkern.report import model_bytes

    recipe = parse_recipe(args.recipe) if args.recipe else None
    if recipe is not None and recipe.needs_calibration:
        raise UsageError(f"--recipe {args.recipe}: it needs calibration data; use llmkern compress")
    if args.out.expanduser().resolve() == args.path.expanduser().resolve():
        raise UsageError(f"--out {args.out}: it is the folder that is read; name another")
    refuse_foreign(args.out)
    quiet_transformers()
    progress(f"loading {args.path}")
    model = converting.open_source(args.path, getattr(torch, args.dtype) if args.dtype else None)
    before = model_bytes(model)
    report = None if recipe is None else converting.solve_again(model, recipe)
    converting.refuse(model, args.format)
    folder = llmkern.save(model, args.out, format=args.format, tokenizer=_tokenizer(args.path), report=report)
    try:
        same = converting.compare(model, loading.load(folder))
    except ValueError:
        shutil.rmtree(folder)
        raise
    return {
        "path": str(args.path),
        "out": str(args.out),
        "format": args.format,
        "recipe": str(recipe) if recipe else None,
        "layers": same,
        "bytes_before": before,
        "bytes_after": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _tokenizer(path: Path) -> Any:
    """The tokenizer, if there is one; it is said if there is none."""
    from llmkern.models import load_tokenizer

    try:
        return load_tokenizer(str(path))
    except ValueError as error:
        progress(f"llmkern {NAME}: warning: {error}")
        return None


def show(result: dict[str, Any]) -> str:
    """One line."""
    how = f"new codes by {result['recipe']}" if result["recipe"] else f"{result['layers']} packed layers, same values"
    return f"{result['out']}: {result['format']}, {how}; {megabytes(result['bytes_after'])} MB"
