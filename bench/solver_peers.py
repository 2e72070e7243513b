"""Loss and seconds of one layer's solve: ours, the papers in plain PyTorch, llm-compressor and GPTQModel.

Each library runs in a process of its own, in the environment that `--env NAME=PYTHON` names; one that is not given is
a row that says so. All solve the same weights with the same second moment, in turn, so that all see the same load; the
losses, tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ), are taken here of the dense weights they return. Peers' scales are found before
their clock starts, ours while it runs. Each is timed right after an untimed solve of the same, as the layers of a model
follow each other. 576-column layers have groups of 64 (128 does not divide them), others of 128.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.results import ROOT, write
from bench.solver_worker import ANSWER
from llmkern import data
from llmkern._dense import product
from llmkern.models import load_model
from llmkern.solvers import Hessian
from llmkern.solvers.solution import energy

PEERS = ("llmcompressor", "gptqmodel")
# Ours, for every method of the others: the one whose seconds, and whose loss, are compared with theirs.
RIVALS = {"gptq": "gptq", "2:4": "2:4, published"}
BLOCK = 12  # of SmolLM2's 30


class Case(NamedTuple):
    """A layer: weight [N, K], the second moment of its input [K, K]."""

    name: str
    weight: Tensor
    moment: Tensor
    group_size: int


class Worker:
    """A library's process."""

    def __init__(self, library: str, command: Sequence[str], threads: int) -> None:
        self.library = library
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [*command, library], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.about = self._answer()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a job; RuntimeError if the process ends instead."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"{self.library}: the worker ended with {self._process.wait()}; run it by hand to see why")


def synthetic(n: int, k: int) -> Case:
    """A layer with correlated inputs of heavy tails and a few features far greater than others, as in real models."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2 * k, k, generator=generator)
    mixed = product(tokens, torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5)
    # Student's t of 4 degrees of freedom: a normal over the root of a mean of squares.
    tails = torch.randn(2 * k, 4, generator=generator).square().mean(1, keepdim=True).rsqrt()
    spread = torch.rand(k, generator=generator).mul(3).exp()
    spread[torch.randperm(k, generator=generator)[:4]] *= 30
    moment = Hessian(k).add(mixed * tails * spread).matrix()
    return Case(f"synthetic {n} x {k}", torch.randn(n, k, generator=generator) * 0.02, moment, 128)


def smollm2(windows: int) -> list[Case]:
    """The gate and down projections of a block of SmolLM2-135M, on calibration text."""
    model, tokenizer = load_model("smollm2")
    ids = data.calibration_windows(data.token_ids(tokenizer, data.builtin_text()), windows, 512)
    mlp = model.model.layers[BLOCK].mlp
    layers: dict[str, nn.Linear] = {"gate_proj": mlp.gate_proj, "down_proj": mlp.down_proj}
    hessians = {name: Hessian(layer.in_features) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, h=hessians[name]: h.add(x[0]) and None)
    for rows in ids.split(4):
        model(input_ids=rows, use_cache=False)
    return [
        Case(
            f"SmolLM2 layers.{BLOCK}.mlp.{name} {layer.out_features} x {layer.in_features}",
            layer.weight.detach().clone(), hessians[name].matrix(), 64 if layer.in_features % 128 else 128,
        )
        for name, layer in layers.items()
    ]  # fmt: skip


def start(environments: dict[str, str], threads: int) -> list[Worker]:
    """A worker of ours, of the reference, and of every peer that has an environment."""
    ours = [sys.executable, "-m", "bench.solver_worker"]
    workers = [Worker(library, ours, threads) for library in ("llmkern", "reference")]
    script = str(ROOT / "bench" / "solver_worker.py")
    return workers + [Worker(peer, [python, "-I", script], threads) for peer, python in environments.items()]


def measure(case: Case, workers: Sequence[Worker], repeats: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """A row per method of every worker: loss, and seconds over the repeats, in which the methods take turns."""
    hessian = Hessian.from_matrix(case.moment)
    whole = energy(case.weight, hessian)
    torch.save((case.weight, case.moment), folder / "case.pt")
    job: dict[str, Any] = {"case": str(folder / "case.pt"), "group_size": case.group_size, "threads": threads}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for repeat in range(repeats):
        for worker in workers:
            for method in worker.about["methods"]:
                out = None if repeat else str(folder / "solved.pt")
                answer = worker.ask(job | {"method": method, "out": out})
                if out:
                    loss = energy(case.weight - torch.load(out), hessian) / whole
                    rows[worker.library, method] = {
                        "case": case.name, "library": worker.library, "method": method, "loss": loss,
                        "seconds": [], "cpu_seconds": [],
                    }  # fmt: skip
                for kind, value in answer.items():
                    rows[worker.library, method][kind].append(value)
    mine = {method: row for (library, method), row in rows.items() if library == "llmkern"}
    for row in rows.values():
        for kind in ("seconds", "cpu_seconds"):
            values = row[kind]
            row[kind] = {
                "median": round(statistics.median(values), 4), "least": round(min(values), 4),
                "greatest": round(max(values), 4),
            }  # fmt: skip
    for row in rows.values():
        if row["library"] != "llmkern":
            rival = RIVALS[row["method"].split(",")[0]]
            if row["library"] == "reference" and rival == "gptq":
                rival = "gptq, published"  # the same algorithm
            row["ours"] = rival
            row["time_ratio"] = round(row["seconds"]["median"] / mine[rival]["seconds"]["median"], 2)
            row["loss_ratio"] = round(row["loss"] / mine[rival]["loss"], 4)
    return list(rows.values())


def show(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    seconds = row["seconds"]
    text = f"{row['library']:14} {row['method']:16} loss {row['loss']:.6f}  {seconds['median']:8.3f} s"
    text += f" ({seconds['least']:.3f} .. {seconds['greatest']:.3f}; {row['cpu_seconds']['least']:.3f} of processors)"
    if "ours" in row:
        text += f"  against our {row['ours']}: time x{row['time_ratio']}, loss x{row['loss_ratio']}"
    return text


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solver_peers", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=PYTHON",
        help=f"the python of an environment that has a peer, of {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=4096, help="N = K of the synthetic layer (%(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--out", default="solver_peers", help="bench/results/OUT.json (%(default)s)")
    args = parser.parse_args(argv)
    environments = dict(pair.split("=", 1) for pair in args.env if "=" in pair)
    if len(environments) < len(args.env) or set(environments) - set(PEERS):
        parser.error(f"--env takes NAME=PYTHON, NAME of {', '.join(PEERS)}, each once; got {', '.join(args.env)}")
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    workers = start(environments, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        for case in (*smollm2(args.windows), synthetic(args.size, args.size)):
            print(case.name, file=sys.stderr)
            for row in measure(case, workers, args.repeats, args.threads, Path(folder)):
                rows.append(row)
                print(f"  {show(row)}", file=sys.stderr, flush=True)
    versions = {worker.library: worker.about["torch"] for worker in workers}
    for worker in workers:
        worker.close()
    missing = {peer: "not run: no --env for it" for peer in PEERS if peer not in environments}
    write(args.out, {"repeats": args.repeats, "torch_of": versions, "missing": missing, "rows": rows})


if __name__ == "__main__":
    main()
