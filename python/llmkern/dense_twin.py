"""The dense model beside the one that is being compressed: what its layers would have been given.

    compressed   hidden state k  -> block k, layer after layer solved -> hidden state k + 1
    dense        hidden state k' -> block k with its dense weights    -> hidden state k' + 1

It costs a second hidden state per batch, the dense weights of one block, and a forward more for each one that there is
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmkern.activations import Calls, Store
from llmkern.blocks import Call, hidden_state
from llmkern.calibration import move, move_call
from llmkern.shared_inputs import DenseRun


class DenseTwin:
    """One chain of blocks as it was, of which `inside` one block at a time can run."""

    def __init__(self, hidden: Store) -> None:
        self.hidden = hidden
        self._block: nn.Module | None = None
        self._weights: dict[str, Tensor] = {}
        self._calls: Calls | None = None
        self._device = torch.device("cpu")
        self._advanced: set[int] = set()  # batches whose hidden state is the next block's already

    @contextmanager
    def inside(
        self, prefix: str, block: nn.Module, layers: Mapping[str, nn.Module], calls: Calls, device: torch.device
    ) -> Iterator[None]:
        """Before any of the layers, by their full names, of this block is compressed; `calls` on the dense states.

        device: where the block will be when it runs.
        """
        self._weights = {
            f"{name[len(prefix) + 1 :]}.weight": layer.weight.detach().to(device, copy=True)  # type: ignore[operator]
            for name, layer in layers.items()
        }
        self._block, self._calls, self._device = block, calls, device
        try:
            yield
        finally:
            self._weights, self._block, self._calls = {}, None, None
            self._advanced.clear()

    def runs(self, *, advancing: bool) -> Iterator[DenseRun | None]:
        """The block's forward on each batch; None for one whose hidden state is not known.

        advancing: nobody needs the hidden states after this, so what the block hands on takes their place at once.
        """
        assert self._calls is not None
        for at, call in enumerate(self._calls):
            state = self.hidden.get(at)
            if state is None:
                yield None
            else:
                finish = partial(self._hand_on, at) if advancing else None
                yield DenseRun(self._bound(call), state.shape[:-1].numel(), finish)

    def advance(self) -> None:
        """What the block hands on takes the place of what it was given, of each batch where it has not yet."""
        assert self._calls is not None
        for at, call in enumerate(self._calls):
            if at not in self._advanced and self.hidden.get(at) is not None:
                self._hand_on(at, self._bound(call)())

    def _hand_on(self, at: int, output: Any) -> None:
        before = self.hidden.get(at)
        assert before is not None
        self.hidden.put(at, move(hidden_state(output), before.device))
        self._advanced.add(at)

    def _bound(self, call: Call) -> Callable[[], Any]:
        assert self._block is not None
        moved = move_call(call, self._device)
        return partial(functional_call, self._block, self._weights, moved.args, moved.kwargs)
