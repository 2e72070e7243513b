"""What calibration keeps between two blocks: a hidden state per batch, in memory up to a budget and then on disk."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any, NamedTuple, overload

import torch
from torch import Tensor

from llmkern import _memory
from llmkern.blocks import Call, Chain

# Of the memory that is available when a chain of blocks is entered.
SHARE = 4


class Spilled(NamedTuple):
    """A tensor in the file: where, how many bytes its place has, and what it was."""

    offset: int
    room: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Store:
    """One tensor per batch. Those beyond `budget` bytes are in one temporary file, and come back bit for bit.

    budget: bytes in memory, a quarter of what is available where the first tensor is if None; as many `stores` as there
    are share it alike. `put` replaces the tensor of a batch, so a block's outputs can take the place of its inputs one
    by one. The file has no name where the system allows that, and is gone when the store is closed or the process ends,
    however it ends.
    """

    def __init__(self, budget: int | None = None, stores: int = 1) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"compress: activation_budget must be None or bytes >= 0, got {budget!r}")
        self.stores = stores
        self.budget = budget if budget is None else budget // stores
        self.spilled = 0  # tensors that were written to the file
        self._held: dict[int, Tensor] = {}
        self._places: dict[int, Spilled] = {}
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything; the file goes."""
        self._held.clear()
        self._places.clear()
        self._bytes = self._end = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def put(self, at: int, tensor: Tensor | None) -> None:
        """The tensor of batch `at` (None for none), in the place of the one before. OSError when the disk is full."""
        old = self._held.pop(at, None)
        if old is not None:
            self._bytes -= old.nbytes
        if tensor is None:
            self._places.pop(at, None)
            return
        if self.budget is None:
            free = _memory.available(tensor.device)
            self.budget = sys.maxsize if free is None else free // SHARE // self.stores
        if self._bytes + tensor.nbytes <= self.budget:
            # A part of a larger tensor would keep the whole of it.
            self._held[at] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            self._bytes += tensor.nbytes
            return
        self._write(at, tensor)

    def get(self, at: int) -> Tensor | None:
        """The tensor of batch `at`; None if it was never put."""
        if at in self._held:
            return self._held[at]
        return self._read(self._places[at]) if at in self._places else None

    def _write(self, at: int, tensor: Tensor) -> None:
        flat = tensor.detach().contiguous().cpu().view(-1)
        old = self._places.get(at)
        keeps = old is not None and old.room >= flat.nbytes
        offset, room = (old.offset, old.room) if old is not None and keeps else (self._end, flat.nbytes)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="llmkern-activations-", buffering=0)  # noqa: SIM115
            self._file.seek(offset)
            left = _memory.raw(flat)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            where = tempfile.gettempdir()
            raise OSError(
                error.errno, f"compress: {flat.nbytes} bytes of activations do not fit in {where}: {error.strerror}"
            ) from None
        stride = torch.empty_like(tensor, device="meta").stride()  # as a copy of it in memory would have
        self._places[at] = Spilled(offset, room, tensor.shape, stride, tensor.dtype, tensor.device)
        self._end = max(self._end, offset + room)
        self.spilled += 1

    def _read(self, place: Spilled) -> Tensor:
        assert self._file is not None
        flat = torch.empty(place.shape.numel(), dtype=place.dtype)
        self._file.seek(place.offset)
        if not _memory.fill(flat, self._file):
            raise OSError("compress: the file of spilled activations was cut off")
        tensor = flat.view(place.shape)
        if tensor.stride() != place.stride:
            # Kernels may add up in another order for another layout: it comes back as it was.
            tensor = torch.empty_strided(place.shape, place.stride, dtype=place.dtype).copy_(tensor)
        return tensor.to(place.device)


class Calls(Sequence[Call]):
    """The calls of one block, one per batch, put together when they are asked for."""

    def __init__(self, chain: Chain, frames: Sequence[Call], hidden: Store) -> None:
        self.chain, self.frames, self.hidden = chain, frames, hidden

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, at: int) -> Call: ...
    @overload
    def __getitem__(self, at: slice) -> list[Call]: ...
    def __getitem__(self, at: Any) -> Any:
        """The call of batch `at`."""
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        hidden = self.hidden.get(at)
        return self.frames[at] if hidden is None else self.chain.join(self.frames[at], hidden)
