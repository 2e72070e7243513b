"""`llmkern verify`: every tensor of a checkpoint looked at, and one pass of the model if asked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llmkern_cli._common import progress, quiet_transformers

NAME = "verify"
HELP = "Check a checkpoint: checksums, headers, every tensor's shape and values, every packed layer; --forward runs it."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a model folder, ours or another's, or a GGUF file")
    parser.add_argument(
        "--forward", action="store_true", help="run a few tokens, and compare the kernels with the ops' references"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What was checked; `error` and `problems` where something is wrong."""
    from llmkern.verifying import verify

    quiet_transformers()
    result = {"path": str(args.path), **verify(args.path, forward=args.forward)}
    if problems := result["problems"]:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        result["error"] = problems[0] + more
        progress(f"llmkern {NAME}: error: {result['error']}")
    return result


def show(result: dict[str, Any]) -> str:
    """What was checked, then every problem."""
    counts = ", ".join(f"{count} {name}" for name, count in result["checks"].items())
    lines = [f"{result['path']}: {result['kind']}; checked: {counts or 'nothing'}"]
    if (forward := result["forward"]) is not None:
        lines.append(
            f"forward: {forward['tokens']} tokens through {forward['layers']} packed layers "
            f"({', '.join(forward['ops']) or 'none'}); kernels and references differ by {forward['difference']:.2g} in "
            f"outputs of up to {forward['greatest']:.2g}"
        )
    return "\n".join([*lines, *result["problems"], "not valid" if result["problems"] else "valid"])
