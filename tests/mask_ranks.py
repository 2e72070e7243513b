"""Masks on two ranks: `python mask_ranks.py FOLDER`; one JSON object on stdout, a key per scenario."""

import json
import sys
from pathlib import Path

import ranks
import torch
from torch import nn

from llmkern.prune import MaskSet, magnitude_

STEPS = 6
WIDTH = 6
SIZES = ((7, WIDTH), (1, 7), (8, 1), (9, 8))  # one row: a rank has none
EVEN = ((8, WIDTH), (4, 8))  # columns are only sharded evenly


def net(sizes=SIZES):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(k, n) for n, k in sizes))


def optimizer_of(model, kind):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, fused=kind == "fused")


def train(model, optimizer, rank=None):
    """Every rank sees its half of the batch; without a rank the mean over both."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randn(2, 4, WIDTH, generator=generator)
        for half in batch if rank is None else batch[rank : rank + 1]:
            (model(half).square().mean() / (2 if rank is None else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    """All weights as lists, from all ranks."""
    return {
        name.removeprefix("module."): getattr(parameter, "full_tensor", lambda p=parameter: p)().tolist()
        for name, parameter in model.named_parameters()
    }


def shard(model, axis=0, blocks=True):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    place = (lambda parameter: Shard(axis if parameter.ndim == 2 else 0)) if axis else None
    for layer in model if blocks else ():
        fully_shard(layer, shard_placement_fn=place)
    fully_shard(model, shard_placement_fn=place)


def fsdp(kind="adamw", sizes=SIZES, **fields):
    def work(rank):
        model = net(sizes)
        masks = magnitude_(model, 0.5)
        shard(model, **fields)
        optimizer = optimizer_of(model, kind)
        masks.attach(optimizer, gradients=kind == "sgd")
        train(model, optimizer, rank)
        moments = [
            float((state.to_local() != 0)[parameter.to_local() == 0].sum())
            for parameter in model.parameters() if parameter.ndim == 2
            for state in optimizer.state[parameter].values() if hasattr(state, "to_local")
        ]  # fmt: skip
        masks.check()
        return {"weights": whole(model), "moments": moments}

    return work


def switched(rank):
    """As accelerate does: the optimizer is there before the model is sharded, and gets the shares afterwards."""
    model = net()
    masks = magnitude_(model, 0.5)
    optimizer = optimizer_of(model, "adamw")
    masks.attach(optimizer)
    shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, rank)
    masks.check()
    return {"weights": whole(model)}


def gathered(rank):
    """A forward without a backward leaves the outermost weights whole: masks then still go to the shares."""
    model = net()
    masks = magnitude_(model, 0.5)
    shard(model, blocks=False)
    optimizer = optimizer_of(model, "adamw")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(1)
        model(torch.ones(2, WIDTH))
    masks.attach(optimizer)
    masks.check()
    return {"shares": sum(int((p.to_local() == 0).sum()) for p in model.parameters())}


def revived(rank):
    """Each rank sees its share; one that is not 0 is an error where it is."""
    model = net()
    masks = magnitude_(model, 0.5)
    shard(model)
    with torch.no_grad():
        if rank == 1:
            model[3].weight.to_local().fill_(1)
    masks.check()
    return {}


def late(rank):
    """Masks are of whole weights."""
    model = net()
    shard(model)
    return {"made": len(MaskSet.from_model(model))}


def loaded(root):
    """Into a model that is sharded already."""

    def work(rank):
        model = net()
        shard(model)
        masks = MaskSet.load(root / "masks.safetensors", model).apply().check()
        return {"weights": whole(model), "sparsity": masks.sparsity()}

    return work


def ddp(rank):
    model = net()
    masks = magnitude_(model, 0.5)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(wrapped, "adamw")
    masks.attach(optimizer)
    train(wrapped, optimizer, rank)
    masks.check()
    return {"weights": whole(wrapped)}


def alone(kind, sizes=SIZES):
    model = net(sizes)
    masks = magnitude_(model, 0.5)
    optimizer = optimizer_of(model, kind)
    masks.attach(optimizer)
    train(model, optimizer)
    return {"weights": whole(model), "masks": {name: masks.mask(name).tolist() for name in masks.bits}}


def main():
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    result = {f"alone_{kind}": [{"value": alone(kind)}] for kind in ("adamw", "sgd")}
    result["alone_columns"] = [{"value": alone("adamw", EVEN)}]
    model = net()
    magnitude_(model, 0.5).save(root / "masks.safetensors")
    scenarios = {
        "adamw": fsdp(), "fused": fsdp("fused"), "sgd": fsdp("sgd"), "whole": fsdp(blocks=False), "ddp": ddp,
        "columns": fsdp(sizes=EVEN, axis=1), "switched": switched, "gathered": gathered, "revived": revived,
        "late": late, "loaded": loaded(root),
    }  # fmt: skip
    for name, work in scenarios.items():
        result[name] = ranks.together(root, name, 2, work)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
