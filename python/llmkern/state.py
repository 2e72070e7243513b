"""State: the finished parts of a run on disk, so that one that was killed goes on where it was.

    state.json            the fingerprint of the run, what it runs on, and the parts in order with their checksums
    0000.safetensors ...  a part: of a compression the packed layers of one block, or of one group outside the blocks
                          (`llmkern.solved`); of other runs whatever tensors they keep
    lock                  held by the process that writes here

A part is flushed before state.json names it, and both appear by a rename: whenever the process dies, state.json names
whole parts only. A compression keeps no hidden states: what finished blocks hand on is computed again from their packed
weights, one forward per block, which gives the same bits and costs an unbroken run nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from llmkern import weight_writer
from llmkern._files import digest, flush, replace_file
from llmkern.fingerprint import differences
from llmkern.report import machine
from llmkern.solved import Solved, encode

MANIFEST, LOCK = "state.json", "lock"
STATE_VERSION = 2
OURS = re.compile(r"(state\.json|lock|\d{4,}\.safetensors)(\.tmp)?")


class NoState:
    """Keeps nothing: a run without state_dir."""

    notes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    advice = ""

    def read(self, part: str) -> bytes:
        """Nothing can be read: there are no parts."""
        raise KeyError(part)

    def write(self, part: str, solved: Mapping[str, Solved]) -> None:
        """Kept nowhere."""

    def close(self) -> None:
        """Nothing is held."""


class State:
    """The state folder of one run, locked while open. Raises at once what would make it useless later:

    FileExistsError for a folder of something else, BlockingIOError while another process writes there, ValueError for
    the state of another run (its message says what differs) or a damaged one, OSError where nothing can be written.
    `argument` is what its caller calls the folder: errors name it.
    """

    def __init__(
        self, folder: str | Path, fingerprint: dict[str, Any], ranks: int = 1, argument: str = "state_dir"
    ) -> None:
        self.folder, self.argument = Path(folder), argument
        self.notes: tuple[str, ...] = ()
        self._manifest: dict[str, Any] = {"parts": []}
        self._lock = self._acquire()
        try:
            self._manifest = self._open(fingerprint, _running(ranks))
        except BaseException:
            self._lock.close()
            raise

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are done, in the order in which they were."""
        return tuple(entry["name"] for entry in self._manifest["parts"])

    @property
    def advice(self) -> str:
        """What to tell whoever sees the run end early; empty if nothing is kept."""
        if not self.parts:
            return ""
        kept = f"{len(self.parts)} finished parts are kept in {self.folder}"
        return f"{kept}: the same call on the dense model (on the command line with --resume) goes on"

    def read(self, part: str) -> bytes:
        """The bytes of a part, whose checksum was right when the state was opened."""
        return self.path(part).read_bytes()

    def path(self, part: str) -> Path:
        """The file of a part, whose checksum was right when the state was opened."""
        (entry,) = (entry for entry in self._manifest["parts"] if entry["name"] == part)
        return self.folder / entry["file"]

    def write(self, part: str, solved: Mapping[str, Solved]) -> None:
        """Make a part durable. OSError if it cannot be written; the parts before it stay."""
        data, file = encode(solved), self._next_file()
        entry = {"name": part, "file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._replace(file, data)
        self._manifest = self._commit({**self._manifest, "parts": [*self._manifest["parts"], entry]})

    def write_tensors(self, part: str, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
        """Make tensors a durable part, as a safetensors file; alone: then forget the parts before it.

        OSError if it cannot be written; the parts before it stay.
        """
        path = self.folder / self._next_file()
        temporary = path.with_name(path.name + ".tmp")
        try:
            whole = weight_writer.write(temporary, tensors, {}).whole
            size = temporary.stat().st_size
            flush(temporary)
            os.replace(temporary, path)
            flush(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)  # gives a full disk its room back
            raise self._unwritten(path.name, error) from error
        entry = {"name": part, "file": path.name, "bytes": size, "sha256": whole}
        before = self._manifest["parts"]
        self._manifest = self._commit({**self._manifest, "parts": [entry] if alone else [*before, entry]})
        if alone:
            for file in self.folder.glob("*.safetensors"):
                if file.name != entry["file"]:
                    file.unlink()

    def _next_file(self) -> str:
        parts = self._manifest["parts"]
        return f"{int(parts[-1]['file'].partition('.')[0]) + 1 if parts else 0:04}.safetensors"

    def close(self) -> None:
        """Let go of the folder, and of one without parts leave nothing."""
        if not self.parts:
            for file in (MANIFEST, LOCK):
                (self.folder / file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something of others is in it
                self.folder.rmdir()
        self._lock.close()

    def _acquire(self) -> IO[str]:
        """The lock file, locked. The system lets go of it when the process ends, however it ends."""
        import fcntl

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            lock = open(self.folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise BlockingIOError(f"{self.argument} {self.folder}: in use by another process ({holder})") from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}\n")
            lock.flush()
        except OSError as error:
            if error.errno is None:  # one of ours
                raise
            where = error.filename or self.folder / LOCK
            raise type(error)(error.errno, f"{self.argument} {self.folder}: {where}: {error.strerror}") from None
        return lock

    def _refuse_foreign(self) -> None:
        others = [path.name for path in self.folder.iterdir() if not OURS.fullmatch(path.name)]
        if others:
            raise FileExistsError(
                f"{self.argument} {self.folder}: holds {min(others)}, so it is no state; choose another"
            )

    def _open(self, fingerprint: dict[str, Any], running: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / MANIFEST
        manifest = read_manifest(path, self.argument) if path.exists() else {"parts": []}
        if not manifest["parts"]:
            fresh: dict[str, Any] = {
                "version": STATE_VERSION,
                "fingerprint": fingerprint,
                "running": [running],
                "parts": [],
            }
            return self._commit(fresh)
        if differ := differences(manifest["fingerprint"], fingerprint):
            more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
            raise ValueError(f"{self.argument} {self.folder}: of another run: {'; '.join(differ[:3])}{more}")
        whole = self._whole_parts(manifest["parts"])
        if lost := len(manifest["parts"]) - len(whole):
            gone = manifest["parts"][len(whole)]["file"]
            self.notes += (f"{lost} parts of the state are solved again: {gone} is gone",)
        if whole:
            self.notes += (f"resumed after {len(whole)} parts of the state; the seconds of their layers are of then",)
        all_running = manifest["running"] + [running] * (running not in manifest["running"])
        if len(all_running) > 1:
            differ = differences(all_running[0], all_running[-1])
            self.notes += (f"resumed, not bit for bit what one run gives: {'; '.join(differ)}",)
        return self._commit({**manifest, "parts": whole, "running": all_running})

    def _whole_parts(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts up to the first whose file was deleted; ValueError for a file that is not what was written."""
        for count, entry in enumerate(parts):
            path = self.folder / entry["file"]
            if not path.exists():
                return parts[:count]
            check_part(
                path, entry, f"{self.argument} {self.folder}", "; delete that file to go on from the part before it"
            )
        return parts

    def _commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make a manifest durable; returns it."""
        self._replace(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return manifest

    def _replace(self, file: str, data: bytes) -> None:
        try:
            replace_file(self.folder / file, data)
        except OSError as error:
            raise self._unwritten(f"{file} ({len(data)} bytes)", error) from error

    def _unwritten(self, what: str, error: OSError) -> OSError:
        text = f"{self.argument} {self.folder}: {what} cannot be written: {error.strerror or error}"
        return OSError(error.errno, f"{text}; {len(self._manifest['parts'])} parts before it are kept")


def parts_in(folder: Path) -> int:
    """How many parts a state folder names; 0 where there is no state. ValueError if its state.json is damaged."""
    path = folder / MANIFEST
    return len(read_manifest(path)["parts"]) if path.exists() else 0


def check_part(path: Path, entry: Mapping[str, Any], where: str, advice: str = "") -> None:
    """ValueError, which begins with `where` and ends with `advice`, for a file that is not what was written."""
    if (got := digest(path)) != entry["sha256"]:
        raise ValueError(
            f"{where}: {entry['file']} ({entry['name']}) is damaged: wanted {entry['bytes']} bytes of sha256 "
            f"{entry['sha256'][:12]}, got {path.stat().st_size} of {got[:12]}{advice}"
        )


def read_manifest(path: Path, argument: str = "state_dir") -> dict[str, Any]:
    """What a state.json holds. ValueError, which begins with `argument` and the folder, if it is damaged."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
        if version == STATE_VERSION:
            parts = manifest["parts"]
            whole = all(
                {"name", "bytes", "sha256"} <= entry.keys() and OURS.fullmatch(entry["file"]) for entry in parts
            )
            if not whole or not isinstance(manifest["fingerprint"], dict) or not manifest["running"]:
                raise ValueError("fields are missing")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        text = f"{argument} {path.parent}: {path.name} is damaged: {error}; delete the folder to start again"
        raise ValueError(text) from None
    if version != STATE_VERSION:
        raise ValueError(f"{argument} {path.parent}: {path.name} has version {version!r}, wanted {STATE_VERSION}")
    return manifest


def _running(ranks: int) -> dict[str, Any]:
    """What may change the last bits of a result, but not what the result is worth."""
    about = machine()
    transformers = getattr(sys.modules.get("transformers"), "__version__", None)
    return {"cpu": about["cpu"], "threads": about["threads"], "ranks": ranks, "transformers": transformers}
