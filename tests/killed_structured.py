"""Plans and restorations that are killed at random points and resumed: `python killed_structured.py FOLDER`; one JSON
object on stdout. A child dies as in `killed_distill.py`; the next one must end with the same bits.
"""

import json
import sys
from pathlib import Path

import tiny
import torch
from killed_distill import watched
from moments import killed_and_resumed

from llmkern.prune import StructuredReport, apply_structured, plan_structured
from llmkern.state import parts_in

KILLS, SEED = 10, 5


def run(folder, last=0):
    """Channels, heads and a block go, of a model with biases."""
    moments = watched(last)
    model, ids = tiny.llama(num_hidden_layers=4, mlp_bias=True, attention_bias=True), tiny.token_ids(8)
    kept = {"mlp": 0.5, "kv_groups": 1, "blocks": 3, "multiple_of": 8}
    plan = plan_structured(model, ids, **kept, state_dir=folder / "plan", progress=False)
    report = StructuredReport()
    small = apply_structured(
        model, plan, calibration=ids, report=report, state_dir=folder / "apply", progress=False
    )  # fmt: skip
    torch.save([plan.to_json(), report.to_dict(), small.state_dict()], folder / "out")
    return moments.count


def result(folder):
    return (folder / "out").read_bytes()


def parts_of(folder):
    return [parts_in(folder / "plan"), parts_in(folder / "apply")]


def main():
    torch.set_num_threads(1)
    print(json.dumps(killed_and_resumed(run, result, parts_of, Path(sys.argv[1]), kills=KILLS, seed=SEED)))


if __name__ == "__main__":
    main()
