"""Files that survive a crash: what is renamed into place is on the disk first."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from pathlib import Path

CHUNK = 1 << 20
# linux/fcntl.h and linux/fs.h
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def flush(path: Path) -> None:
    """A file or folder to the disk, not only to the system's memory: a rename must not outlive what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders or files in one step (renameat2 of Linux); False where the system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK):
            found.update(data)
    return found.hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`: at every moment the file holds all of the old or all of the new.

    OSError if the disk is full or the folder cannot be written to; the old content stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gives a full disk its room back
        raise
    flush(path.parent)
