"""A student of half of SmolLM2-135M's blocks, distilled, against the same student trained without its teacher.

Both start from the same copies of every other block and see the same windows of the builtin text in the same order, by
the same optimizer; one minimizes the divergence from the teacher, the other the cross-entropy of the text. --dense adds
the teacher itself trained as the latter: what the text alone is worth to a model that lacks nothing. Quality is that of
the evaluation windows of `bench.quality`: perplexity, and the share of tokens that are the likeliest in the model's
view.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality import protocol
from bench.results import write
from llmkern import data
from llmkern.distill import DistillWrapper, drop_layers
from llmkern.distill.training import Settings, train
from llmkern.evaluate import perplexity
from llmkern.models import load_tokenizer
from llmkern.report import model_bytes

SEQLEN, BATCH = 256, 4


class TextAlone(nn.Module):
    """What the loop trains where there is no teacher: the cross-entropy of the text."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        logits = self.student(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
        agreement = (logits.argmax(-1) == input_ids[:, 1:]).float().mean()
        return {"loss": loss, "divergence": torch.zeros_like(loss), "cross_entropy": loss, "agreement": agreement}


@torch.inference_mode()
def accuracy(model: Any, windows: Tensor) -> float:
    """The share of positions 1 to L-1 of windows [n, L] whose token is the model's likeliest."""
    right = 0
    for window in windows:
        guesses = model(input_ids=window[None], use_cache=False).logits[0, :-1].argmax(-1)
        right += int((guesses == window[1:]).sum())
    return right / windows[:, 1:].numel()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.student", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help=f"of {BATCH} windows of {SEQLEN} tokens (%(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="of the students (%(default)s)")
    parser.add_argument("--dense", action="store_true", help="also the dense control")
    parser.add_argument("--dense-rate", type=float, default=1e-4, help="of the dense control (%(default)s)")
    args = parser.parse_args(argv)
    teacher, _, evaluation, _ = protocol()
    ids = data.token_ids(load_tokenizer("smollm2"), data.builtin_text())
    windows = data.calibration_windows(ids, args.steps * BATCH, SEQLEN)
    rows: list[dict[str, Any]] = []

    def add(name: str, model: Any, wrapper: Any = None, rate: float = args.rate) -> None:
        settings = Settings(args.steps, BATCH, rate, dtype="bfloat16")
        history = train(wrapper, windows, settings) if wrapper is not None else []
        model.eval()
        value, share = perplexity(model, evaluation).value, accuracy(model, evaluation)
        kept = share / (rows[0]["accuracy"] if rows else share)
        rows.append({
            "model": name, "blocks": model.config.num_hidden_layers, "bytes": model_bytes(model),
            "perplexity": round(value, 3), "accuracy": round(share, 4), "accuracy_kept": round(kept, 4),
            "rate": rate if history else None, "last_loss": round(history[-1]["loss"], 4) if history else None,
        })  # fmt: skip
        print(f"{name:24}{value:10.3f}  accuracy {share:.4f}  kept {kept:.3f}", file=sys.stderr, flush=True)
        write("student", {
            "steps": args.steps, "tokens": args.steps * BATCH * SEQLEN, "evaluated_tokens": evaluation[:, 1:].numel(),
            "dtype": "bfloat16 products, fp32 parameters", "rows": rows,
        })  # fmt: skip

    add("teacher", teacher)
    add("student, untrained", drop_layers(teacher))
    student = drop_layers(teacher)
    add("student, distilled", student, DistillWrapper(student, teacher))
    student = drop_layers(teacher)
    add("student, text alone", student, TextAlone(student))
    if args.dense:
        dense = copy.deepcopy(teacher)
        add("dense, text alone", dense, TextAlone(dense), args.dense_rate)


if __name__ == "__main__":
    main()
