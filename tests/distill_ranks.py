"""A wrapped student on two ranks: `python distill_ranks.py FOLDER`; one JSON object on stdout, a key per scenario.

Said is whether each rank ends with the parameters that one process ends with, or what it raised.
"""

import json
import sys
from pathlib import Path

import ranks
import tiny
import torch
from torch import nn

from llmkern.distill import DistillWrapper, drop_layers

STEPS = 3
IDS = tiny.token_ids(4)


def made():
    teacher = tiny.llama(num_hidden_layers=4)
    return DistillWrapper(drop_layers(teacher), teacher, ce_weight=0.5, hidden="cosine")


def steps(wrapper, ids):
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        wrapper(input_ids=ids)["loss"].backward()
        optimizer.step()
    return wrapper


def same(found, wanted):
    """Whether parameters by name are equal, but for the order of sums."""
    whole = {
        name.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)() for name, p in found.named_parameters()
    }
    return whole.keys() == wanted.keys() and all(
        torch.allclose(whole[name], wanted[name], rtol=1e-4, atol=1e-5) for name in wanted
    )


def sharded(wanted, head):
    def work(rank):
        from torch.distributed.fsdp import fully_shard

        wrapper = made()
        for layer in wrapper.student.model.layers:
            fully_shard(layer)
        if head:
            fully_shard(wrapper.student.lm_head)
        fully_shard(wrapper)
        return same(steps(wrapper, IDS[2 * rank : 2 * rank + 2]), wanted)

    return work


def replicated(wanted):
    return lambda rank: same(steps(nn.parallel.DistributedDataParallel(made()), IDS[2 * rank : 2 * rank + 2]), wanted)


def main():
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    wanted = {name: parameter.detach() for name, parameter in steps(made(), IDS).named_parameters()}
    scenarios = {"fsdp": sharded(wanted, False), "head": sharded(wanted, True), "ddp": replicated(wanted)}
    said = {}
    for name, work in scenarios.items():
        outcomes = ranks.together(root, name, 2, work)
        said[name] = [outcome.get("value", outcome.get("error")) for outcome in outcomes]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
