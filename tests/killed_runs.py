"""Runs that are killed at random points and resumed: `python killed_runs.py FOLDER`; one JSON object on stdout.

One process loads everything once and forks a child per run. A child counts the moments at which it could die: around
every write, flush and rename of a state, half-way through every write, and before every solve.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import tiny
import torch
from moments import Moments, killed_and_resumed

import llmkern
from llmkern import _files, layer_solver

KILLS, SEED = 20, 5


class WatchedFiles(Moments):
    """Moments half-way through every write too."""

    @contextlib.contextmanager
    def opened(self, *args):
        with open(*args) as file:
            write = file.write

            def in_halves(data):
                write(data[: len(data) // 2])
                file.flush()
                self.pass_by()
                write(data[len(data) // 2 :])

            file.write = in_halves
            yield file


def run(folder, last=0):
    """One run with a state, saved when it is done; how many moments it had."""
    moments = WatchedFiles(last)
    _files.os = type(
        "Watched", (), {**vars(os), "fsync": moments.around(os.fsync), "replace": moments.around(os.replace)}
    )
    _files.open = moments.opened
    layer_solver.solve_and_keep = moments.around(layer_solver.solve_and_keep)
    model = tiny.llama()
    recipe = llmkern.Recipe.parse(
        "gptq-int4-g32", ignore=(), overrides={"down_proj": "gptq-w8a8", "k_proj": "sparsegpt-0.5"}
    )
    report = llmkern.compress(model, recipe, tiny.token_ids(11), state_dir=folder / "state", progress=False)
    llmkern.save(model, folder / "out", report=report)
    return moments.count


def result(folder):
    rows = json.loads((folder / "out" / "report.json").read_text())["rows"]
    return (
        (folder / "out" / "model.safetensors").read_bytes(),
        (folder / "out" / "llmkern.json").read_bytes(),
        [{**row, "seconds": 0} for row in rows],
    )


def parts_of(folder):
    manifest = folder / "state" / "state.json"
    return len(json.loads(manifest.read_text())["parts"]) if manifest.exists() else 0


def main():
    torch.set_num_threads(1)
    print(json.dumps(killed_and_resumed(run, result, parts_of, Path(sys.argv[1]), kills=KILLS, seed=SEED)))


if __name__ == "__main__":
    main()
