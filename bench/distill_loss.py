"""linear_kl_div against plain torch: forward and backward of 2048 rows of SmolLM2-135M's head (49152 words, width 576).

Both models have a head of their own. The teacher's hidden states and head are SmolLM2's on the builtin text; the
student's are the same with noise (a tenth of their standard deviation). Plain torch is F.linear, log_softmax, kl_div
and backward in the dtype of the inputs. Results are compared with float64 first. `products_s` is the time of the matrix
products alone (four, three with a frozen head) by torch.mm, all rows at once, into memory that is there; ours in fp32
are quicker, on a CPU (`llmkern._dense`).

Times are of turns in one process: [least, median, most]. `extra_mb` is the most resident memory (VmHWM) of one step in
a fresh process, less what it had before; the gradients themselves are in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.results import RESULTS, write
from llmkern import data
from llmkern.distill import linear_kl_div
from llmkern.models import load_model

ROWS, CHECKED, NOISE = 2048, 48, 0.1
MEMORY_GOAL, TIME_GOAL = 0.2, 1.0  # ours over plain torch's, at most
DTYPES = ("float32", "bfloat16")
CASES = (("forward_kl", "trained"), ("forward_kl", "frozen"), ("reverse_kl", "trained"), ("jsd", "trained"))
# Of a gradient, relative to its norm, from float64's; or as far as plain torch's is, where rounding decides.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 2e-2}


def make_inputs(path: Path) -> None:
    """Hidden states [2048, 576] and head [49152, 576] of teacher and student, fp32, in one file."""
    model, tokenizer = load_model("smollm2")
    tokens = data.token_ids(tokenizer, data.builtin_text()[: 16 * ROWS])[:ROWS].view(4, -1)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state.reshape(ROWS, -1).float()
    head = model.lm_head.weight.detach().float()
    random = torch.Generator().manual_seed(0)
    noisy = [x + NOISE * x.std() * torch.randn(x.shape, generator=random) for x in (hidden, head)]
    torch.save([*noisy, hidden, head], path)


def read_inputs(path: Path, dtype: torch.dtype, head: str, rows: int = ROWS) -> list[Tensor]:
    """Student's hidden states and head, which want gradients unless frozen, then the teacher's."""
    student, weight, teacher, teacher_weight = (x.to(dtype) for x in torch.load(path))
    student, teacher = student[:rows].clone(), teacher[:rows].clone()
    return [student.requires_grad_(), weight.requires_grad_(head == "trained"), teacher, teacher_weight]


def plain(kind: str, inputs: Sequence[Tensor]) -> Tensor:
    """The loss in plain torch."""
    student, weight, teacher, teacher_weight = inputs
    with torch.no_grad():
        lp = F.log_softmax(F.linear(teacher, teacher_weight), -1)
    lq = F.log_softmax(F.linear(student, weight), -1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, log_target=True, reduction="batchmean")

    if kind == "forward_kl":
        return kl(lp, lq)
    if kind == "reverse_kl":
        return kl(lq, lp)
    lm = torch.logaddexp(lp, lq) - math.log(2)
    return 0.5 * (kl(lp, lm) + kl(lq, lm))


def ours(kind: str, inputs: Sequence[Tensor]) -> Tensor:
    """The loss by linear_kl_div."""
    return linear_kl_div(*inputs, kind=kind).loss


WAYS: dict[str, Callable[[str, Sequence[Tensor]], Tensor]] = {"ours": ours, "plain": plain}


def step(way: str, kind: str, inputs: Sequence[Tensor]) -> Tensor:
    """Forward and backward; the gradients are new."""
    for x in inputs[:2]:
        x.grad = None
    loss = WAYS[way](kind, inputs)
    loss.backward()
    return loss.detach()


def errors(path: Path, kind: str, dtype: str) -> dict[str, float]:
    """Way -> how far its gradients are from those of float64 autograd on the same values, relative to their norm."""
    narrow = read_inputs(path, getattr(torch, dtype), "trained", CHECKED)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in narrow]
    step("plain", kind, exact)
    found = {}
    for way in WAYS:
        step(way, kind, narrow)
        pairs = zip(narrow[:2], exact[:2], strict=True)
        found[way] = max(float((x.grad.double() - y.grad).norm() / y.grad.norm()) for x, y in pairs)  # type: ignore[union-attr]
    if found["ours"] > max(TOLERANCE[dtype], found["plain"]):
        raise RuntimeError(f"{kind}, {dtype}: gradients are off by {found['ours']:.2e}")
    return found


def products(inputs: Sequence[Tensor], room: Sequence[Tensor]) -> None:
    """The products of a step."""
    student, weight, teacher, teacher_weight = (x.detach() for x in inputs)
    logits, grad_hidden, grad_weight = room
    torch.mm(teacher, teacher_weight.T, out=logits)
    torch.mm(student, weight.T, out=logits)
    torch.mm(logits, weight, out=grad_hidden)
    if inputs[1].requires_grad:
        torch.mm(logits.T, student, out=grad_weight)


def times(path: Path, kind: str, head: str, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Way -> seconds of each of its turns."""
    inputs = read_inputs(path, getattr(torch, dtype), head)
    room = [inputs[0].new_empty(ROWS, len(inputs[1])), inputs[0].new_empty(0), inputs[0].new_empty(0)]
    calls: dict[str, Callable[[], object]] = {way: lambda way=way: step(way, kind, inputs) for way in WAYS}  # type: ignore[misc]
    calls["products"] = lambda: products(inputs, room)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):  # the first is the warm-up
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def extra_memory(path: str, way: str, kind: str, head: str, dtype: str) -> None:
    """Print the peak of one step in this process, after a step of few rows."""
    few = read_inputs(Path(path), getattr(torch, dtype), head, 8)
    step(way, kind, few)
    del few
    inputs = read_inputs(Path(path), getattr(torch, dtype), head)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step(way, kind, inputs)
    print(resident("VmHWM") - before)


def memory(path: Path, way: str, kind: str, head: str, dtype: str) -> int:
    """Bytes of `extra_memory` in a fresh process."""
    code = "import sys; from bench.distill_loss import extra_memory; extra_memory(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(path), way, kind, head, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}, {kind}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distill_loss", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way (%(default)s)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="the rows of others are kept (%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print the rows only")
    args = parser.parse_args(argv)
    chosen = args.dtypes.split(",")
    earlier = RESULTS / "distill_loss.json"
    kept = json.loads(earlier.read_text(encoding="utf-8"))["rows"] if earlier.is_file() else []
    rows = [row for row in kept if row["dtype"] not in chosen]
    with tempfile.TemporaryDirectory(prefix="llmkern-distill-") as temporary:
        path = Path(temporary) / "inputs.pt"
        make_inputs(path)
        fp64 = {kind: errors(path, kind, "float64")["ours"] for kind in dict(CASES)}
        for dtype in chosen:
            for kind, head in CASES:
                rows.append(measured(path, kind, head, dtype, args.repeats))
                print(json.dumps(rows[-1]), file=sys.stderr)
    if not args.no_write:
        goals = {"memory_goal": MEMORY_GOAL, "time_goal": TIME_GOAL}
        write("distill_loss", {"rows_of_logits": ROWS, **goals, "fp64_gradient_error": fp64, "rows": rows})


def measured(path: Path, kind: str, head: str, dtype: str, repeats: int) -> dict[str, Any]:
    """One row of the result."""
    error = errors(path, kind, dtype)
    seconds = times(path, kind, head, dtype, repeats)
    row: dict[str, Any] = {"dtype": dtype, "kind": kind, "head": head}
    for way, own in seconds.items():
        row[f"{way}_s"] = [round(f(own), 3) for f in (min, statistics.median, max)]
    row["time_ratio"] = round(row["ours_s"][1] / row["plain_s"][1], 3)
    for way in WAYS:
        row[f"{way}_extra_mb"] = round(memory(path, way, kind, head, dtype) / 1e6, 1)
        row[f"{way}_gradient_error"] = float(f"{error[way]:.2e}")
    row["memory_ratio"] = round(row["ours_extra_mb"] / row["plain_extra_mb"], 3)
    row["memory_met"], row["time_met"] = row["memory_ratio"] <= MEMORY_GOAL, row["time_ratio"] <= TIME_GOAL
    return row


if __name__ == "__main__":
    main()
