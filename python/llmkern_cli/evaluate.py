"""`llmkern eval`: perplexity, speed and bytes of a model."""

from __future__ import annotations

import argparse
from typing import Any

from llmkern_cli._common import Number, at_least, megabytes, progress, quiet_transformers, table

NAME = "eval"
HELP = "Perplexity, speed and bytes of a model."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a hub id, or smollm2")
    parser.add_argument("--text", default="builtin", metavar="builtin|FILE", help="its last quarter is evaluated")
    parser.add_argument("--seqlen", type=at_least(2), default=512, metavar="L", help="tokens per window (%(default)s)")
    parser.add_argument("--windows", type=at_least(1), default=16, metavar="N", help="at most so many (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The object of `--json`."""
    from llmkern import data
    from llmkern.evaluate import evaluate
    from llmkern.models import load_model

    text = data.read_text(args.text)
    quiet_transformers()
    progress(f"loading {args.model}")
    model, tokenizer = load_model(args.model)
    windows = data.evaluation_windows(data.token_ids(tokenizer, text), args.windows, args.seqlen)
    progress(f"evaluating {windows.shape[0]} windows of {args.seqlen} tokens")
    return {"model": args.model, **evaluate(model, windows), "windows": windows.shape[0], "seqlen": args.seqlen}


def show(result: dict[str, Any]) -> str:
    """A small table."""
    rows = [
        ("perplexity", Number(result["perplexity"], 3)),
        ("tokens", Number(result["tokens"], 0)),
        ("prefill tokens/s", Number(result["prefill_tokens_per_s"], 1)),
        ("decode tokens/s", Number(result["decode_tokens_per_s"], 1)),
        ("MB", megabytes(result["bytes"])),
    ]
    return table(("", result["model"]), rows)
