"""`llmkern distill`: train a student on what its teacher predicts, and save it."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from llmkern_cli._common import (
    Number,
    UsageError,
    at_least,
    number,
    progress,
    quiet_transformers,
    refuse_foreign,
    resume,
)

NAME = "distill"
HELP = "Train a student on what its teacher predicts, and save it."
SHARE = 0.1  # of the steps, the last of them, whose mean is reported


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("student", metavar="STUDENT", help="a folder, a .gguf file, a hub id, or smollm2")
    parser.add_argument("teacher", metavar="TEACHER", nargs="?", help="as STUDENT; none with --drop-layers")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="a new folder, or one of ours")
    parser.add_argument(
        "--drop-layers", action="store_true",
        help="the one model named is the teacher, and every other block of it the student",
    )  # fmt: skip
    parser.add_argument(
        "--text", default="builtin", metavar="builtin|FILE|hf:NAME", help="its first three quarters are trained on"
    )
    parser.add_argument("--seqlen", type=at_least(2), default=512, metavar="L", help="tokens per window (%(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=4, metavar="N", help="windows per step (%(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=at_least(1), metavar="N", help="(200)")
    budget.add_argument("--tokens", type=at_least(1), metavar="N", help="instead of --steps: as many as reach N tokens")
    parser.add_argument(
        "--samples", type=at_least(1), metavar="N", help="different windows (default: as many as are trained on)"
    )
    parser.add_argument("--lr", type=number(above=0), default=1e-4, metavar="R", help="the largest (%(default)s)")
    parser.add_argument(
        "--kind", choices=("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"), default="forward_kl",
        help="the divergence (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=number(above=0), default=1.0, metavar="T", help="(%(default)s)")
    parser.add_argument(
        "--ce-weight", type=number(least=0), default=0.0, metavar="W", help="of the text's own tokens (%(default)s)"
    )
    parser.add_argument("--hidden", choices=("none", "cosine", "squarehead"), default="none", help="(%(default)s)")
    parser.add_argument("--hidden-weight", type=number(least=0), default=1.0, metavar="W", help="(%(default)s)")
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, help="keep the teacher's predictions there first, or use those there are"
    )
    parser.add_argument("--k", type=at_least(1), default=64, metavar="K", help="of a cache: classes (%(default)s)")
    parser.add_argument("--sample", action="store_true", help="of a cache: draws of the teacher, not its likeliest")
    parser.add_argument("--keep-masks", action="store_true", help="the zeros of a pruned student stay zeros")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products (%(default)s)")
    parser.add_argument("--device", metavar="D", help="such as cpu or cuda:0 (default: a GPU, if there is one)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the same run where it was killed, if it was")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What was trained, for how long, and the loss at the end."""
    import llmkern
    from llmkern import data
    from llmkern.distill.training import Settings, train

    # All that can be refused is refused before the first long step.
    if args.drop_layers == (args.teacher is not None):
        raise UsageError("wanted STUDENT TEACHER, or one model with --drop-layers")
    refuse_foreign(args.out)
    if args.cache is not None and (args.kind != "forward_kl" or args.hidden != "none"):
        raise UsageError("--cache: it serves --kind forward_kl without --hidden alone")
    state = resume(args.out, args.resume)
    steps = args.steps or (-(-args.tokens // (args.batch * args.seqlen)) if args.tokens else 200)
    settings = Settings(steps, args.batch, args.lr, dtype=args.dtype, seed=args.seed)
    text = data.read_text(args.text)
    quiet_transformers()
    student, teacher, tokenizers, dtype = _models(args)
    masks = llmkern.prune.MaskSet.from_model(student) if args.keep_masks else None
    windows = data.calibration_windows(
        data.token_ids(tokenizers[0], text), args.samples or steps * args.batch, args.seqlen, args.seed
    )
    wrapper = _wrapper(args, student, teacher, tokenizers, windows)
    del teacher  # a cache takes its place
    start = time.perf_counter()
    history = train(wrapper, windows, settings, masks=masks, state_dir=state)
    if masks is not None:
        masks.check()
    student.to(dtype)
    llmkern.save(student, args.out, tokenizer=tokenizers[0])
    shutil.rmtree(state, ignore_errors=True)
    last = history[-max(round(SHARE * len(history)), 1) :]
    return {
        "out": str(args.out),
        "seconds": time.perf_counter() - start,
        "steps": len(history),
        "tokens": len(history) * args.batch * args.seqlen,
        "blocks": student.config.num_hidden_layers,
        **{name: sum(row[name] for row in last) / len(last) for name in last[0]},
        "history": history,
    }


def _models(args: argparse.Namespace) -> tuple[Any, Any, tuple[Any, Any], Any]:
    """Student in fp32, teacher, the tokenizers of both, and the dtype that the student had."""
    import torch

    from llmkern.distill import check_tokenizers, drop_layers
    from llmkern.models import load_model
    from llmkern.nn import PackedLinear

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    progress(f"loading {args.student}")
    first, tokenizer = load_model(args.student, device=device)
    if any(isinstance(module, PackedLinear) for module in first.modules()) and not args.drop_layers:
        raise ValueError(f"student {args.student}: its layers are packed; first llmkern convert --format dense")
    dtype = first.dtype
    if args.drop_layers:
        return drop_layers(first).float(), first, (tokenizer, tokenizer), dtype
    progress(f"loading {args.teacher}")
    teacher, theirs = load_model(args.teacher, device=device)
    check_tokenizers(tokenizer, theirs)
    return first.float(), teacher, (tokenizer, theirs), dtype


def _wrapper(args: argparse.Namespace, student: Any, teacher: Any, tokenizers: tuple[Any, Any], windows: Any) -> Any:
    """The student with its teacher, or with a cache of what the teacher predicts for these windows."""
    from llmkern.distill import DistillWrapper, TeacherCache

    hidden = None if args.hidden == "none" else args.hidden
    options = {
        "kind": args.kind, "temperature": args.temperature, "ce_weight": args.ce_weight, "hidden": hidden,
        "hidden_weight": args.hidden_weight, "tokenizers": tokenizers,
    }  # fmt: skip
    wrapper = DistillWrapper(student, teacher, **options)  # also refuses what the cache would be written for in vain
    if args.cache is None:
        return wrapper
    classes = min(model.get_output_embeddings().out_features for model in (student, teacher))
    cache = TeacherCache.write(
        args.cache, teacher, windows, k=args.k, temperature=args.temperature, sample=args.sample, seed=args.seed,
        classes=classes,
    )  # fmt: skip
    return DistillWrapper(student, cache, **options)


def show(result: dict[str, Any]) -> str:
    """Where the student is, and how well it follows."""
    agreement = Number(100 * result["agreement"], 1)
    return (
        f"{result['out']}: {result['blocks']} blocks, trained on {result['tokens']} tokens in "
        f"{Number(result['seconds'], 1)} s; divergence {Number(result['divergence'], 4)}, {agreement} % of tokens as "
        "the teacher's, at the end"
    )
