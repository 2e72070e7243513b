"""Runs that are killed at random points and resumed: `python killed_runs.py FOLDER`; one JSON object on stdout.

One process loads everything once and forks a child per run. A child counts the moments at which it could die: around
every write, flush and rename of a state, half-way through every write, and before every solve.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import tiny
import torch
from moments import Moments

import llmkern
from llmkern import _files, pipeline

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
    pipeline.solve_and_keep = moments.around(pipeline.solve_and_keep)
    model = tiny.llama()
    recipe = llmkern.Recipe.parse(
        "gptq-int4-g32", ignore=(), overrides={"down_proj": "gptq-w8a8", "k_proj": "sparsegpt-0.5"}
    )
    report = llmkern.compress(model, recipe, tiny.token_ids(11), state_dir=folder / "state", progress=False)
    llmkern.save(model, folder / "out", report=report)
    return moments.count


def forked(work):
    """Run `work` in a child; (the signal that ended it or 0, what it returned)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with os.fdopen(writer, "w") as pipe:
            pipe.write(str(work()))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def result(folder):
    rows = json.loads((folder / "out" / "report.json").read_text())["rows"]
    return (
        (folder / "out" / "model.safetensors").read_bytes(),
        (folder / "out" / "llmkern.json").read_bytes(),
        [{**row, "seconds": 0} for row in rows],
    )


def main():
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    run(root / "warm")  # imports whatever is imported late, once for all children
    code, said = forked(lambda: run(root / "whole"))
    assert code == 0
    whole, moments = result(root / "whole"), int(said)
    different, parts = [], []
    for last in random.Random(SEED).sample(range(1, moments + 1), KILLS):
        folder = root / f"killed{last}"
        code, _ = forked(lambda: run(folder, last))  # noqa: B023
        assert code == -signal.SIGKILL, (last, code)
        manifest = folder / "state" / "state.json"
        parts.append(len(json.loads(manifest.read_text())["parts"]) if manifest.exists() else 0)
        code, _ = forked(lambda: run(folder))  # noqa: B023
        if code or result(folder) != whole:
            different.append(last)
        shutil.rmtree(folder)
    print(json.dumps({"moments": moments, "parts": parts, "different": different}))


if __name__ == "__main__":
    main()
