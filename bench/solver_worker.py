"""One library's solvers in its own process: a job per line of stdin is solved, and answered with the seconds it took.

    python -I bench/solver_worker.py llmcompressor|gptqmodel     in an environment of that library
    python -m bench.solver_worker llmkern|reference              in ours

A job is JSON: method, case (a torch file of weight [N, K] and the second moment [K, K]), group_size, threads, out
(where the solved dense weight [N, K] goes; null not to keep it). The answer is a line that starts with ANSWER, as
libraries write to stdout too; its cpu_seconds are those of all processors. Not timed: reading, copies of what a solver
overwrites, scales that a solver is given, and one solve before.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ANSWER = "answer "
# (weight, second moment, group size) -> what to time, which returns the solved weight
Method = Callable[[Tensor, Tensor, int], Callable[[], Tensor]]


def llmkern_methods() -> dict[str, Method]:
    """Ours: as they are when not told otherwise, and the published algorithms alone, none of which finds a loss."""
    from llmkern import solvers
    from llmkern.solvers import Hessian

    def gptq(**options: Any) -> Method:
        def prepare(w: Tensor, h: Tensor, size: int) -> Callable[[], Tensor]:
            hessian = Hessian.from_matrix(h)
            return lambda: solvers.gptq(w, hessian, bits=4, group_size=size, **options).weight

        return prepare

    def sparsegpt(**options: Any) -> Method:
        def prepare(w: Tensor, h: Tensor, size: int) -> Callable[[], Tensor]:
            hessian = Hessian.from_matrix(h)
            return lambda: solvers.sparsegpt(w, hessian, sparsity="2:4", **options).weight

        return prepare

    return {
        "gptq": gptq(),
        "gptq, no loss": gptq(loss=False),
        "gptq, mse": gptq(clip="mse"),
        "gptq, descent": gptq(descent=2),
        "gptq, published": gptq(act_order="dynamic", clip=None, loss=False),
        "2:4, published": sparsegpt(refit=False, loss=False),
        "2:4, refit": sparsegpt(mask="sparsegpt"),
    }


def reference_methods() -> dict[str, Method]:
    """The papers in plain PyTorch."""
    from bench import reference_solvers

    return {
        "gptq": lambda w, h, size: lambda: reference_solvers.gptq(w, h, bits=4, group_size=size).weight,
        "2:4": lambda w, h, size: lambda: reference_solvers.sparsegpt(w, h, prune_n=2, prune_m=4).weight,
    }


def llmcompressor_methods() -> dict[str, Method]:
    """llm-compressor: GPTQ in its default order on scales of two of its observers, and SparseGPT."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
    from llmcompressor.observers import Observer

    def gptq(observer: str) -> Method:
        def prepare(w: Tensor, h: Tensor, size: int) -> Callable[[], Tensor]:
            args = QuantizationArgs(
                num_bits=4, symmetric=True, strategy="group", group_size=size, actorder="static", observer=observer
            )
            watch = Observer.load_from_registry(observer, base_name="weight", args=args)
            watch(w)
            grid = watch.get_qparams()
            scale, zero = grid["scale"].unsqueeze(0), grid["zero_point"].unsqueeze(0)
            stacked, moments = w.clone().unsqueeze(0), h.clone().unsqueeze(0)
            return lambda: quantize_weight(stacked, moments, scale, zero, None, args)[0][0]

        return prepare

    def sparsegpt(w: Tensor, h: Tensor, size: int) -> Callable[[], Tensor]:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
        moments = {layer: h.clone()}
        return lambda: sparsify_weight(layer, moments, 0.5, 2, 4, 128, 0.01, False)[1]

    return {"gptq": gptq("memoryless_minmax"), "gptq, mse": gptq("memoryless_mse"), "2:4": sparsegpt}


def gptqmodel_methods() -> dict[str, Method]:
    """GPTQModel: GPTQ as its configuration has it, and in activation order on static groups with the damping of all."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    def gptq(**options: Any) -> Method:
        def prepare(w: Tensor, h: Tensor, size: int) -> Callable[[], Tensor]:
            layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
            layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
            task = GPTQ(layer, QuantizeConfig(bits=4, group_size=size, sym=True, **options))
            task.quantizer.configure(perchannel=True)
            task.H, task.nsamples, task.fallback = h.clone(), len(h), None
            return lambda: task.quantize()[0]

        return prepare

    return {
        "gptq": gptq(),
        "gptq, desc_act": gptq(desc_act=True, static_groups=True, damp_percent=0.01),
    }


LIBRARIES = {
    "llmkern": llmkern_methods,
    "reference": reference_methods,
    "llmcompressor": llmcompressor_methods,
    "gptqmodel": gptqmodel_methods,
}


@torch.inference_mode()
def main(library: str) -> None:
    methods = LIBRARIES[library]()
    print(ANSWER + json.dumps({"methods": list(methods), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        torch.set_num_threads(job["threads"])
        weight, moment = torch.load(job["case"])
        # The first solve after another library's turn would pay for cold caches, whatever the method.
        methods[job["method"]](weight, moment, job["group_size"])()
        solve = methods[job["method"]](weight, moment, job["group_size"])
        start, busy = time.perf_counter(), time.process_time()
        solved = solve()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        if job["out"]:
            torch.save(solved.float().contiguous(), job["out"])
        print(ANSWER + json.dumps({"seconds": seconds, "cpu_seconds": busy}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
