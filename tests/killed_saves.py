"""Saves over an older folder that are killed at every moment: `python killed_saves.py FOLDER exchange|rename`; one JSON
object on stdout.

A child per moment: around every flush, rename and exchange, and half-way through every write of tensors.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

import tiny
import torch
from moments import Moments, forked

import llmkern
from llmkern import checkpoint_folder
from llmkern.nn import PackedLinear


def save(model, path, how, last=0):
    """One save; how many moments it had."""
    moments = Moments(last)
    moments.within_tensors()
    checkpoint_folder.flush = moments.around(checkpoint_folder.flush)
    checkpoint_folder.exchange = moments.around(checkpoint_folder.exchange if how == "exchange" else lambda *_: False)
    for name in ("rename", "write_text"):
        setattr(Path, name, moments.around(getattr(Path, name)))
    llmkern.save(model, path, max_shard_size="50KB")
    return moments.count


def state(path):
    """Which model is in the folder; its files must be whole."""
    if not path.exists():
        return "absent"
    checkpoint_folder.check_files(path)
    formats = {layer.format for layer in llmkern.load(path).modules() if isinstance(layer, PackedLinear)}
    return {"Int8Weight": "old", "Int4Weight": "new"}[formats.pop()]


def main():
    torch.set_num_threads(1)
    root, how = Path(sys.argv[1]), sys.argv[2]
    old, new = tiny.llama(num_hidden_layers=1), tiny.llama(num_hidden_layers=1)
    llmkern.patch(old, "rtn-int8")
    llmkern.patch(new, "rtn-int4-g32")
    llmkern.save(old, root / "old")
    shutil.copytree(root / "old", root / "warm" / "m")
    code, said = forked(lambda: save(new, root / "warm" / "m", how))
    assert code == 0
    moments = int(said)
    counts, wrong = {"old": 0, "new": 0, "absent": 0}, []
    for last in range(1, moments + 1):
        folder = root / f"killed{last}"
        shutil.copytree(root / "old", folder / "m")
        code, _ = forked(lambda: save(new, folder / "m", how, last))  # noqa: B023
        assert code == -signal.SIGKILL, (last, code)
        counts[state(folder / "m")] += 1
        llmkern.save(new, folder / "m")
        if state(folder / "m") != "new" or [entry.name for entry in folder.iterdir()] != ["m"]:
            wrong.append(last)
        shutil.rmtree(folder)
    print(json.dumps({"moments": moments, "wrong": wrong, **counts}))


if __name__ == "__main__":
    main()
