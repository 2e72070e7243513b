"""Durable: what structured pruning has finished, block by block on disk, so that a run that was killed goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._version import __version__
from llmkern.fingerprint import about_calls
from llmkern.prune.walk import Walk
from llmkern.state import State


class Durable:
    """The tensors of every finished block, in a state folder; without a folder nothing is finished and nothing kept.

    A context: it holds the folder's lock meanwhile. An interruption then says what is kept.
    """

    def __init__(self, folder: str | Path | None, walk: Walk, about: Mapping[str, Any]) -> None:
        """about: all that decides the run but the calibration. Raises what `State` does."""
        self._state = None
        if folder is not None:
            all_about = {
                "llmkern": __version__, "torch": torch.__version__, **about, "calibration": about_calls(walk.batches),
            }  # fmt: skip
            self._state = State(folder, all_about, argument=f"{walk.caller}: state_dir")

    @property
    def done(self) -> int:
        """How many blocks are finished: the first ones."""
        return 0 if self._state is None else len(self._state.parts)

    def read(self, at: int) -> dict[str, Tensor]:
        """What was kept of a finished block."""
        from safetensors.torch import load_file

        assert self._state is not None
        return load_file(self._state.path(_part(at)))

    def write(self, at: int, tensors: Mapping[str, Tensor]) -> None:
        """Block `at` is finished. OSError if it cannot be written; those before it stay."""
        if self._state is not None:
            self._state.write_tensors(_part(at), tensors)

    def __enter__(self) -> Durable:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._state is None:
            return
        advice = self._state.advice
        self._state.close()
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(advice) from None


def _part(at: int) -> str:
    return f"block {at}"
