"""Prune a quarter of every MLP, distil what was lost back in, quantize the rest; a row per step of what it costs.

python examples/prune_distil_quantize.py --out out/toolbox
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

import llmkern
from llmkern import data
from llmkern.distill import DistillWrapper
from llmkern.distill.training import Settings, train
from llmkern.evaluate import evaluate
from llmkern.models import load_model
from llmkern.prune import apply_structured, plan_structured

STEPS = ("dense", "pruned", "distilled", "quantized")


def make(args):
    """A folder per step in args.out."""
    dense, tokenizer = load_model(args.model)
    ids = data.token_ids(tokenizer, data.read_text(args.text))
    calibration = data.calibration_windows(ids, args.samples, args.length)

    def keep(step, model, layout="dense"):
        llmkern.save(model, args.out / step, layout, tokenizer=tokenizer)

    keep("dense", dense)
    plan = plan_structured(dense, calibration, mlp=args.mlp, multiple_of=args.multiple_of)
    model = apply_structured(dense, plan, calibration=calibration)
    keep("pruned", model)
    windows = data.calibration_windows(ids, args.steps * args.batch, args.length, seed=1)
    train(DistillWrapper(model, dense), windows, Settings(args.steps, args.batch, dtype=args.dtype))
    keep("distilled", model)
    llmkern.compress(model, args.recipe, calibration)
    keep("quantized", model, "compressed-tensors")


def measure(args):
    """A row per step, of its folder as stock transformers loads it: size, perplexity, tokens per second."""
    ids = data.token_ids(load_model(str(args.out / "dense")).tokenizer, data.read_text(args.text))
    for step in STEPS:
        model = AutoModelForCausalLM.from_pretrained(args.out / step).eval()
        size = sum(path.stat().st_size for path in (args.out / step).glob("*.safetensors"))
        found = evaluate(model, data.evaluation_windows(ids, args.windows, args.length))
        yield {"step": step, "file_bytes": size, **found}


def options():
    """What can be changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a folder, a GGUF file or smollm2 (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="for a folder per step")
    parser.add_argument("--text", default="builtin", help="builtin, or a text file (%(default)s)")
    parser.add_argument("--mlp", type=float, default=0.75, help="share of channels to keep (%(default)s)")
    parser.add_argument("--multiple-of", type=int, default=64, help="for the number of channels (%(default)s)")
    parser.add_argument("--recipe", default="gptq-int4-g64", help="to quantize by (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of distillation (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="windows per step (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="that distillation computes in (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (%(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on (%(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="windows to evaluate on (%(default)s)")
    return parser


def main(argv=None):
    """Make all steps, and print the table."""
    args = options().parse_args(argv)
    make(args)
    print(f"{'':12}{'MB':>8}{'perplexity':>12}{'prefill':>10}{'decode':>10}  tokens/s")
    for row in measure(args):
        speeds = f"{row['prefill_tokens_per_s']:10.0f}{row['decode_tokens_per_s']:10.1f}"
        print(f"{row['step']:12}{row['file_bytes'] / 1e6:8.1f}{row['perplexity']:12.3f}{speeds}")


if __name__ == "__main__":
    main()
