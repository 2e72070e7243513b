"""Processes with a limit in time that are begun again where they stopped when they die or hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench._gpu.journal import Journal

RESTARTS = 8
POLL_SECONDS = 0.05
# A process is ended together with those that it started. A group, not a session, where Python can make one: whoever
# ends all processes of ours shall find these too.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


@dataclass
class Outcome:
    """How a step went. code: the last process's; deaths: why each one ended that did not end by itself."""

    code: int | None = None
    seconds: float = 0.0
    out_of_time: bool = False
    deaths: list[str] = field(default_factory=list)


def run(
    command: Sequence[str], log: Path, seconds: float, *, env: Mapping[str, str] | None = None,
    journal: Journal | None = None, quiet: float | None = None, finished: Sequence[int] = (0,),
) -> Outcome:  # fmt: skip
    """Run `command`, its output appended to `log`, for `seconds` at most.

    With a journal, an exit code that is not in `finished`, or no new line in it for `quiet` seconds, is a death: it is
    written to the journal, and the command is run again, which is to go on behind that line.
    """
    outcome, start = Outcome(), time.monotonic()
    while True:
        left = seconds - (time.monotonic() - start)
        if left <= 0:
            outcome.out_of_time = True
            break
        outcome.code, death = _once(command, log, left, env, journal, quiet)
        if death is None and outcome.code in finished:
            break
        if death == "out of time":
            outcome.out_of_time = True
            break
        death = death or _ended(outcome.code)
        outcome.deaths.append(death)
        if journal is None or len(outcome.deaths) > RESTARTS:
            break
        journal.write(died=death)
    outcome.seconds = time.monotonic() - start
    return outcome


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with code {code}"


def _once(
    command: Sequence[str], log: Path, seconds: float, env: Mapping[str, str] | None, journal: Journal | None,
    quiet: float | None,
) -> tuple[int | None, str | None]:  # fmt: skip
    """(exit code, None), or what made us end it."""
    with log.open("a", encoding="utf-8") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **GROUP,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        try:
            return _watch(process, seconds, journal, quiet)
        except BaseException:
            _end(process)
            raise


def _watch(
    process: subprocess.Popen, seconds: float, journal: Journal | None, quiet: float | None
) -> tuple[int | None, str | None]:
    start = changed = time.monotonic()
    size = -1
    while True:
        try:
            return process.wait(POLL_SECONDS), None
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if journal is not None and quiet is not None:
            grown = journal.path.stat().st_size if journal.path.exists() else 0
            size, changed = grown, (now if grown != size else changed)
            if now - changed > quiet:
                return _end(process), f"nothing happened for {quiet:.0f} s"
        if now - start > seconds:
            return _end(process), "out of time"


def _end(process: subprocess.Popen) -> int:
    """End the process and those that it started: they are a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
