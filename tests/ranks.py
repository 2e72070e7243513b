"""Runs of several ranks: `python ranks.py FOLDER`; one JSON object on stdout, a key per scenario.

One process loads everything once and forks the ranks of each scenario, which meet through a file.
"""

import datetime
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

import llmkern
from llmkern import layer_solver, pipeline

TIMEOUT, SHORT = 120, 3  # seconds until a rank that says nothing is given up


def together(root, name, size, work, timeout=TIMEOUT):
    """`work(rank)` on `size` ranks: for each its exit code, what it returned or its error, and the seconds it took."""
    store, pids = root / f"{name}.store", []
    for rank in range(size):
        if pid := os.fork():
            pids.append(pid)
            continue
        patience = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=patience)
        start = time.monotonic()
        try:
            said = {"value": work(rank)}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        said["seconds"] = time.monotonic() - start
        (root / f"{name}.{rank}").write_text(json.dumps(said))
        os._exit(0)
    outcomes = []
    for rank, pid in enumerate(pids):
        if rank and timeout == SHORT:
            os.kill(pid, signal.SIGKILL)  # it hangs
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = root / f"{name}.{rank}"
        outcomes.append({"code": code, **(json.loads(said.read_text()) if said.exists() else {})})
    return outcomes


def values(outcomes):
    """What each rank returned, all of which must have ended well."""
    assert [rank["code"] for rank in outcomes] == [0] * len(outcomes)
    return [rank["value"] for rank in outcomes]


def compress(model, recipe, calibration, **fields):
    """What a run gave, as plain values: the report's rows, a digest of the model, and the layers solved here."""
    solve, solved = layer_solver.solve_and_keep, []
    layer_solver.solve_and_keep = lambda caller, name, *rest: solved.append(name) or solve(caller, name, *rest)
    report = llmkern.compress(model, recipe, calibration, progress=False, **fields)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    rows = [{**vars(row), "seconds": 0} for row in report.rows]
    return {"digest": digest.hexdigest(), "rows": rows, "tokens": report.tokens, "solved": solved}


class Experts(torch.nn.Module):
    """Two experts of two layers on one input; the sign of a batch says which of them sees it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = {name: torch.nn.Linear(16, 16) for name in ("a1", "a2", "b1", "b2")}
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(block)])

    def forward(self, x):
        expert = "a" if x[0, 0] > 0 else "b"
        block = self.blocks[0]
        return block[expert + "1"](x) + block[expert + "2"](x)


def batches(*signs):
    x = torch.randn(len(signs), 8, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0] = torch.tensor(signs) * x[:, 0, 0].abs()
    return list(x)


def llama(root, name, **fields):
    """A llama with a layer outside the blocks, saved by rank 0."""

    def work(rank):
        model = tiny.llama()
        recipe = llmkern.Recipe.parse("gptq-int4-g32", ignore=())
        result = compress(model, recipe, list(tiny.token_ids(11).split(2)), **fields)
        if rank == 0:
            llmkern.save(model, root / name)
        return result

    return work


def mixture(kind, experts):
    """Two batches."""
    recipe = llmkern.Recipe.parse("gptq-int4-g16", experts=experts)
    calibration = [tiny.inputs("t5" if kind == "switch" else kind, part) for part in tiny.token_ids(12).split(6)]
    return compress(getattr(tiny, kind)(), recipe, calibration)


def corrected():
    """Three batches. Without what comes after the columns, where one code that falls the other way moves all others."""
    recipe = llmkern.Recipe.parse("gptq-int3-g16", input_correction=1, ignore=(), descent=0, scale_refit=0)
    return compress(tiny.llama(), recipe, list(tiny.token_ids(12).split(4)))


def infinite_weight(rank):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    return compress(model, "gptq-int4-g32", list(tiny.token_ids(11).split(2)))


def infinite_batch(rank):
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    x[1, 0, 0] = float("nan")
    return compress(tiny.mlp(), "gptq-int4", list(x))


def different(rank):
    return compress(tiny.llama(), ["gptq-int4-g32", "gptq-int8"][rank], tiny.token_ids())


def dies(root, how):
    """Rank 1 dies, or stops, in the second block."""

    def work(rank):
        group = pipeline._Run._groups

        def groups(self, layers, *rest, **options):
            if rank == 1 and "model.layers.1.mlp.down_proj" in layers:
                os.kill(os.getpid(), how)
            return group(self, layers, *rest, **options)

        pipeline._Run._groups = groups
        return llama(root, "dies", state_dir=root / f"state{int(how)}")(rank)

    return work


def main():
    torch.set_num_threads(1)
    pipeline.PART_BYTES = 20_000
    root = Path(sys.argv[1])
    result = {"one": [{"value": llama(root, "one")(0)}]}
    scenarios = {
        "two": (2, llama(root, "two")),
        "idle": (3, lambda rank: compress(tiny.llama(), "gptq-int4-g32", list(tiny.token_ids(11).split(8)))),
        "experts": (2, lambda rank: compress(Experts(), "gptq-int4", batches(1, -1, 1, -1, 1, 1))),
        "mixtral": (2, lambda rank: mixture("mixtral", "routed")),
        "switch": (3, lambda rank: mixture("switch", "all")),
        "corrected": (2, lambda rank: corrected()),
        "unreached": (2, lambda rank: compress(Experts(), "gptq-int4", batches(1, 1, 1))),
        "data_free": (2, lambda rank: compress(tiny.llama(), "rtn-int4-g32", None)),
        "infinite_weight": (2, infinite_weight),
        "infinite_batch": (2, infinite_batch),
        "different": (2, different),
        "killed": (2, dies(root, signal.SIGKILL)),
        "resumed": (2, llama(root, "resumed", state_dir=root / f"state{int(signal.SIGKILL)}")),
        "hangs": (2, dies(root, signal.SIGSTOP), SHORT),
        "foreign": (2, lambda rank: compress(tiny.llama(), "gptq-int8", tiny.token_ids(), state_dir=root / "state9")),
    }
    for name, (size, work, *timeout) in scenarios.items():
        result[name] = together(root, name, size, work, *timeout)
    result["one_experts"] = [{"value": compress(Experts(), "gptq-int4", batches(1, -1, 1, -1, 1, 1))}]
    result["one_mixtral"] = [{"value": mixture("mixtral", "routed")}]
    result["one_switch"] = [{"value": mixture("switch", "all")}]
    result["one_corrected"] = [{"value": corrected()}]
    result["one_data_free"] = [{"value": compress(tiny.llama(), "rtn-int4-g32", None)}]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
