"""Caches and trainings that are killed at random points and resumed: `python killed_distill.py cache|train FOLDER`; one
JSON object on stdout.

A child dies around a flush or a rename, or half-way through a write; the next one must end with the same bytes.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import tiny
import torch
from killed_runs import forked
from moments import Moments

from llmkern import _files, state, weight_writer
from llmkern.distill import DistillWrapper, TeacherCache, drop_layers
from llmkern.distill.training import Settings, train

KILLS, SEED = 8, 3


def watched(last):
    """Moments around flushes and renames, and within writes of tensors."""
    moments = Moments(last)
    write = weight_writer._write

    def in_halves(put, data):
        write(put, data[: len(data) // 2])
        moments.pass_by()
        write(put, data[len(data) // 2 :])

    weight_writer._write = in_halves
    wrapped = {**vars(os), "fsync": moments.around(os.fsync), "replace": moments.around(os.replace)}
    _files.os = state.os = type("Watched", (), wrapped)
    return moments


def cache(folder, last=0):
    moments = watched(last)
    teacher, ids = tiny.llama(), tiny.token_ids(20)
    TeacherCache.write(folder / "c", teacher, ids.split(3), k=6, sample=True, shard_mb=0.004, progress=False)
    return moments.count


def training(folder, last=0):
    """With dropout, so that random numbers must go on where they were."""
    moments = watched(last)
    teacher = tiny.gpt2(n_layer=3, resid_pdrop=0.2)
    wrapper = DistillWrapper(drop_layers(teacher), teacher, ce_weight=0.5)
    settings = Settings(6, 2, 1e-3, seed=4)
    history = train(wrapper, tiny.token_ids(9), settings, state_dir=folder / "state", save_seconds=0, progress=False)
    torch.save([history, wrapper.student.state_dict()], folder / "c")
    return moments.count


def result(folder):
    path = folder / "c"
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"}


def main():
    torch.set_num_threads(1)
    run, root = {"cache": cache, "train": training}[sys.argv[1]], Path(sys.argv[2])
    for name in ("warm", "whole"):
        (root / name).mkdir()
    run(root / "warm")  # imports whatever is imported late, once for all children
    code, said = forked(lambda: run(root / "whole"))
    assert code == 0
    whole, moments = result(root / "whole"), int(said)
    different, parts = [], []
    for last in random.Random(SEED).sample(range(1, moments + 1), KILLS):
        folder = root / f"killed{last}"
        folder.mkdir()
        code, _ = forked(lambda: run(folder, last))  # noqa: B023
        assert code == -signal.SIGKILL, (last, code)
        manifest = folder / ("c" if run is cache else "state") / "state.json"
        found = json.loads(manifest.read_text())["parts"] if manifest.exists() else []
        parts.append(found[-1]["name"] if found else None)
        code, _ = forked(lambda: run(folder))  # noqa: B023
        if code or result(folder) != whole:
            different.append(last)
        shutil.rmtree(folder)
    print(json.dumps({"moments": moments, "parts": parts, "different": different}))


if __name__ == "__main__":
    main()
