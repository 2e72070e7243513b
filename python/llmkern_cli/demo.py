"""`llmkern demo`: a real model pruned and quantized, saved, loaded again, measured, and asked a question."""

from __future__ import annotations

import argparse
import copy
import html
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkern_cli._common import (
    Number,
    at_least,
    compress_into,
    megabytes,
    parse_recipe,
    progress,
    quiet_transformers,
    refuse_foreign,
    table,
)

NAME = "demo"
HELP = "Compress a small real model in four ways, save, load again, and compare."
RECIPES = ("dense", "rtn-int8", "gptq-int4-g64", "sparsegpt-2:4", "sparsegpt-2:4-int4-g64")
# To calibrate. Half of what quality is measured with (`bench.quality`), so that two cores are done in ten minutes.
SAMPLES = 16
MARKER = "llmkern-demo.json"
QUESTION = "What is the capital of France, and what is it known for?"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--out", default=Path("out/demo"), metavar="DIR", type=Path, help="(%(default)s)")
    parser.add_argument("--model", default="smollm2", metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--samples", type=at_least(1), default=SAMPLES, metavar="N", help="to calibrate (%(default)s)")
    parser.add_argument("--windows", type=at_least(1), default=16, metavar="N", help="to evaluate (%(default)s)")
    parser.add_argument("--seqlen", type=at_least(2), default=512, metavar="L", help="tokens per window (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of the table, the report page, and the seconds of every step."""
    from llmkern import data
    from llmkern.models import load_model

    started = time.perf_counter()
    refuse_foreign(args.out, MARKER)
    recipes = {name: None if name == "dense" else parse_recipe(name) for name in RECIPES}
    quiet_transformers()
    progress(f"loading {args.model}")
    dense, tokenizer = load_model(args.model)
    ids = data.token_ids(tokenizer, data.builtin_text())
    calibration = data.calibration_windows(ids, args.samples, args.seqlen)
    evaluation = data.evaluation_windows(ids, args.windows, args.seqlen)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / MARKER).write_text("{}\n", encoding="utf-8")
    rows = []
    for name, recipe in recipes.items():
        folder = args.out / name.replace(":", "of")
        rows.append(_row(name, recipe, dense, tokenizer, folder, calibration, evaluation))
    result = {
        "samples": args.samples, "seqlen": args.seqlen, "rows": rows, "report": str(args.out / "report.html"),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    (args.out / MARKER).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.out / "report.html").write_text(_page(result), encoding="utf-8")
    return result


def _row(
    name: str, recipe: Any, dense: Any, tokenizer: Any, folder: Path, calibration: Any, evaluation: Any
) -> dict[str, Any]:
    """One recipe from the dense weights to the measured row; what is measured is the model loaded from disk."""
    import llmkern
    from llmkern.evaluate import evaluate
    from llmkern.models import load_model

    steps: dict[str, float] = {}
    with _timed(steps, "compress and save"):
        if recipe is None:
            llmkern.save(dense, folder, tokenizer=tokenizer)
            solving = 0.0
        else:
            windows = calibration if recipe.needs_calibration else None
            report = compress_into(folder, copy.deepcopy(dense), tokenizer, recipe, windows)
            solving = report.seconds
    with _timed(steps, "load"):
        model = load_model(str(folder)).model
    with _timed(steps, "evaluate"):
        measured = evaluate(model, evaluation)
    with _timed(steps, "answer"):
        sample = answer(model, tokenizer)
    progress(f"{name}: " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in steps.items()))
    return {
        "recipe": name,
        "perplexity": measured["perplexity"],
        "linear_bytes": linear_bytes(model, dense),
        "model_bytes": measured["bytes"],
        "prefill_tokens_per_s": measured["prefill_tokens_per_s"],
        "decode_tokens_per_s": measured["decode_tokens_per_s"],
        "compress_seconds": solving,
        "sample": sample,
        "folder": str(folder),
        "steps": steps,
    }


def linear_bytes(model: Any, dense: Any) -> int:
    """Bytes of the layers of `model` that are block linear layers (nn.Linear but not the lm_head) in `dense`."""
    import torch

    from llmkern.evaluate import model_bytes

    head = dense.get_output_embeddings()
    names = [
        name for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    return sum(model_bytes(model.get_submodule(name)) for name in names)


def answer(model: Any, tokenizer: Any) -> str:
    """The model's greedy answer to one question, in its own chat format if it has one."""
    from llmkern.evaluate import complete

    prompt = QUESTION
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return complete(model, tokenizer, prompt, tokens=32)


@contextmanager
def _timed(steps: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    steps[name] = time.perf_counter() - start


HEADER = ("recipe", "perplexity", "linear MB", "model MB", "prefill tok/s", "decode tok/s", "compress s")


def _cells(row: dict[str, Any]) -> tuple:
    return (
        row["recipe"],
        Number(row["perplexity"], 2),
        megabytes(row["linear_bytes"]),
        megabytes(row["model_bytes"]),
        Number(row["prefill_tokens_per_s"], 0),
        Number(row["decode_tokens_per_s"], 1),
        Number(row["compress_seconds"], 1),
    )


def show(result: dict[str, Any]) -> str:
    """The table, what the models answer, and where the report is."""
    lines = [table(HEADER, [_cells(row) for row in result["rows"]]), "", f"{QUESTION}"]
    lines += [f"  {row['recipe']}: {row['sample']}" for row in result["rows"]]
    lines += ["", f"report: {result['report']}  ({result['seconds']:.0f} s in all)"]
    return "\n".join(lines)


def _page(result: dict[str, Any]) -> str:
    """The same table as one self-contained page, with links to the per-layer reports."""
    head = "".join(f"<th>{cell}</th>" for cell in HEADER)
    body = []
    for row in result["rows"]:
        name, *numbers = _cells(row)
        folder = Path(row["folder"]).name
        label = html.escape(name)
        if name != "dense":
            label = f'<a href="{html.escape(folder)}/report.html">{label}</a>'
        body.append(f"<tr><td>{label}</td>" + "".join(f"<td>{cell}</td>" for cell in numbers) + "</tr>")
    answers = "".join(
        f"<dt>{html.escape(row['recipe'])}</dt><dd>{html.escape(row['sample'])}</dd>" for row in result["rows"]
    )
    return PAGE.format(head=head, body="\n".join(body), question=html.escape(QUESTION), answers=answers)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>llmkern demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
dt {{ font-weight: 600 }}
</style>
<h1>llmkern demo</h1>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
<p>The linked pages show every layer.</p>
<h2>{question}</h2>
<dl>{answers}</dl>
</html>
"""
