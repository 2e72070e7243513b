"""Files that survive a crash: what is renamed into place is on the disk first."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def flush(path: Path) -> None:
    """A file or folder to the disk, not only to the system's memory: a rename must not outlive what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
