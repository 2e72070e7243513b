"""A folder that `save` writes: its files, and how it appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkern._files import flush

FORMATS = ("compressed-tensors", "gptq", "dense")
FORMAT_VERSION = 1
META, WEIGHTS, EXTRA = "llmkern.json", "model.safetensors", "llmkern.safetensors"
MARK = ".llmkern-"  # in the names of temporary siblings


def refuse_foreign(path: Path) -> None:
    """FileExistsError unless `path` is free, an empty folder, or a folder that llmkern wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"save: {path} exists and is not a folder")
    if any(path.iterdir()) and not (path / META).is_file():
        raise FileExistsError(f"save: {path} exists and was not written by llmkern (no {META}); choose another folder")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; becomes `path` at the end, or disappears if something goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}{MARK}{os.getpid()}-", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for file in folder.iterdir():
            flush(file)
        flush(folder)
        if path.exists():
            old = folder.with_name(folder.name + "-old")
            path.rename(old)
            folder.rename(path)
            shutil.rmtree(old)
        else:
            folder.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs left beside `path`; what a living process writes stays."""
    for left in path.parent.glob(f".{path.name}{MARK}*"):
        pid = left.name.rsplit(MARK, 1)[1].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
