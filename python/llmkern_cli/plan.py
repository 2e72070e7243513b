"""`llmkern plan`: what `compress` would do to a model, and the memory, disk and time it would take."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from llmkern_cli._common import Number, UsageError, at_least, megabytes, quiet_transformers, recipe_of, table

NAME = "plan"
HELP = "What a recipe would do to a model, from its config and headers alone: layers, bytes, memory, time."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a hub id, or smollm2")
    parser.add_argument("--recipe", required=True, metavar="R", help="a short form such as gptq-int4-g128, or a file")
    parser.add_argument("--samples", type=at_least(1), default=128, metavar="N", help="windows (%(default)s)")
    parser.add_argument("--seqlen", type=at_least(2), default=512, metavar="L", help="tokens per window (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The plan. A recipe that does not fit the model is bad usage."""
    from llmkern.models import open_skeleton
    from llmkern.planning import plan

    recipe = recipe_of(args)
    quiet_transformers()
    model = open_skeleton(args.model)
    try:
        made = plan(model, recipe, samples=args.samples, seqlen=args.seqlen)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return {"model": args.model, **made.to_dict()}


def show(result: dict[str, Any]) -> str:
    """A line per kind of layer, what is left, and the estimates."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for layer in result["layers"]:
        kinds.setdefault((tuple(layer["shape"]), layer["method"], layer["format"]), []).append(layer)
    rows = [
        (
            len(layers),
            "x".join(map(str, shape)),
            method,
            form or "?",
            megabytes(sum(layer["bytes_before"] for layer in layers)),
            "?" if layers[0]["bytes_after"] is None else str(megabytes(sum(x["bytes_after"] for x in layers))),
        )
        for (shape, method, form), layers in kinds.items()
    ]
    lines = [f"{result['model']}: {result['recipe']}", ""]
    lines += [table(("layers", "N x K", "method", "format", "MB now", "MB then"), rows), ""]
    reasons = Counter(skip["reason"] for skip in result["skipped"])
    lines += [f"left as it is: {count} x {reason}" for reason, count in reasons.items()]
    after = result["model_bytes_after"]
    then = f" -> {megabytes(after)} MB" if after is not None else ""
    lines.append(f"the whole model: {megabytes(result['model_bytes_before'])} MB{then}; on disk about "
                 f"{megabytes(result['disk_bytes'])} MB")  # fmt: skip
    peak, streamed, free = (result[key] for key in ("peak_bytes", "peak_bytes_streamed", "available_bytes"))
    memory = f"memory: about {megabytes(peak)} MB"
    memory += "" if streamed is None else f", streamed {megabytes(streamed)} MB"
    memory += f" ({megabytes(result['activation_bytes'])} MB of it activations, which can go to disk)"
    lines.append(memory + ("" if free is None else f"; {megabytes(free)} MB are available"))
    lines.append(f"time: about {Number(result['seconds'], 0)} s on this machine, if nothing else runs")
    return "\n".join([*lines, *result["notes"]])
