"""Caches and trainings that are killed at random points and resumed: `python killed_distill.py cache|train FOLDER`; one
JSON object on stdout.

A child dies around a flush or a rename, or half-way through a write; the next one must end with the same bytes.
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from moments import Moments, killed_and_resumed

from llmkern import _files, state
from llmkern.distill import DistillWrapper, TeacherCache, drop_layers
from llmkern.distill.training import Settings, train
from llmkern.state import MANIFEST

KILLS, SEED = 8, 3


def watched(last):
    """Moments around flushes and renames, and within writes of tensors."""
    moments = Moments(last)
    moments.within_tensors()
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


def parts_of(folder):
    manifest = next((path for path in (folder / "c" / MANIFEST, folder / "state" / MANIFEST) if path.exists()), None)
    found = json.loads(manifest.read_text())["parts"] if manifest else []
    return found[-1]["name"] if found else None


def main():
    torch.set_num_threads(1)
    run, root = {"cache": cache, "train": training}[sys.argv[1]], Path(sys.argv[2])
    print(json.dumps(killed_and_resumed(run, result, parts_of, root, kills=KILLS, seed=SEED)))


if __name__ == "__main__":
    main()
