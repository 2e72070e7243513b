"""A folder that `save` writes: its files, and how it appears complete or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkern._files import digest, exchange, flush
from llmkern._json import read_object
from llmkern.weight_files import INDEX

FORMATS = ("compressed-tensors", "gptq", "dense")
FORMAT_VERSION = 2
META, EXTRA = "llmkern.json", "llmkern.safetensors"
CHANGED = f"was changed since it was saved; without {META} the folder loads as what its config.json says"
LONGEST_HEADER = 100_000_000  # the format's own limit
MARK, OLD = ".llmkern-", "-old"  # in the names of temporary siblings, and of those that were `path` before


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
    """A temporary sibling to write to; becomes `path` at the end, or disappears if something goes wrong.

    Where two folders can be exchanged in one step, `path` is the old or the new one at every moment. Elsewhere there is
    a moment without it; what is killed just then is put back by the next save.
    """
    path = path.resolve()  # a link stays what it is
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}{MARK}{os.getpid()}-", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for file in folder.rglob("*"):
            flush(file)
        flush(folder)
        old = folder.with_name(folder.name + OLD)
        if not path.exists():
            folder.rename(path)
        elif not exchange(folder, path):
            path.rename(old)
            folder.rename(path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs left beside `path`, or put it back; what a living process writes stays."""
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}{MARK}*")):
        pid = left.name.rsplit(MARK, 1)[1].split("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if left.name.endswith(OLD) and not path.exists():
            left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def seal(meta: Mapping[str, Any]) -> str:
    """The SHA-256 of what llmkern.json holds, but for `seal` itself: it tells an accident, not a forger."""
    text = json.dumps({key: value for key, value in meta.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def header_digest(path: Path) -> str:
    """The SHA-256 of a safetensors file up to the end of its header (of all of it where it says to be longer)."""
    with path.open("rb") as file:
        start = file.read(8)
        return hashlib.sha256(start + file.read(min(int.from_bytes(start, "little"), LONGEST_HEADER))).hexdigest()


def check_unchanged(folder: Path, meta: Mapping[str, Any], paths: Iterable[Path]) -> None:
    """What load checks of a folder's checksums before it reads `paths`: all but the values of tensors, in no time.

    ValueError for another index or header; a warning for another configuration, which users may change.
    """
    sums, headers, paths = meta["sha256"], meta["headers"], list(paths)
    for path in paths:
        if headers.get(path.name) != header_digest(path):
            raise ValueError(f"load: the header of {path.name} {CHANGED}")
    if gone := headers.keys() - {path.name for path in paths}:
        raise ValueError(f"load: {META} lists {min(gone)}, which is not there, or not in the index")
    for path in (folder / INDEX, folder / "config.json", folder / "generation_config.json"):
        if sums.get(path.name) == (digest(path) if path.is_file() else None):
            continue
        if path.name == INDEX:
            raise ValueError(f"load: {path.name} {CHANGED}")
        warnings.warn(f"load: {path.name} was changed since it was saved", stacklevel=3)


def check_files(folder: Path) -> int:
    """Compare every file that llmkern.json lists with its checksum there; how many there are.

    Raises FileNotFoundError without llmkern.json or for a listed file that is not there, ValueError naming the file for
    one of another content, for a model file that is not listed, and for an llmkern.json without checksums.
    """
    if not (folder / META).is_file():
        raise FileNotFoundError(f"verify: {folder} holds no {META}: not a folder that llmkern.save wrote")
    listed = read_object(folder / META, "verify").get("sha256")
    if not isinstance(listed, dict) or not listed or not all(isinstance(known, str) for known in listed.values()):
        raise ValueError(f"verify: {META} holds no checksums")
    for name, known in listed.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"verify: {META} lists {name!r}, which is outside the folder")
        if not path.is_file():
            raise FileNotFoundError(f"verify: {META} lists {name}, which is not there")
        if (found := digest(path)) != known:
            raise ValueError(f"verify: {name} was changed since it was saved: its SHA-256 is {found}, wanted {known}")
    unlisted = {path.name for path in folder.glob("*.safetensors")} - listed.keys()
    if unlisted:
        raise ValueError(f"verify: {sorted(unlisted)[0]} is not listed in {META}")
    return len(listed)
