"""A model's blocks one after the other on calibration data: what each is called with, and what layers in it see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import blocks
from llmkern._dense import dense_by_onednn
from llmkern.activations import Calls, Store
from llmkern.blocks import Call, Chain
from llmkern.calibration import calls_of, quiet, rows_that_count
from llmkern.prune import rebuild


class Walk:
    """The calls of a model's blocks, batch by batch; `stream` makes hidden states that go from block to block.

    rows[at]: bool [batch, length], the tokens of a batch that count; None when all do.
    """

    def __init__(self, model: nn.Module, calibration: Any, caller: str) -> None:
        """Runs one batch through the model. ValueError: no tokens, or blocks that do not run one after the other."""
        self.model, self.caller = model, caller
        self.name, _ = rebuild.only_blocks(model, caller)
        self.batches = calls_of(model, calibration, caller)
        self.rows = [rows_that_count(model, batch) for batch in self.batches]
        chains, irregular = blocks.learn(model, self._run(self.batches[0]))
        if irregular or len(chains) != 1 or not all(chains[0].follows[1:]):
            raise ValueError(f"{caller}: the blocks of {self.name} do not run one after the other, each once")
        self.chain: Chain = chains[0]
        if self.chain.names != [f"{self.name}.{at}" for at in range(len(self.chain.names))]:
            raise ValueError(f"{caller}: the blocks of {self.name} do not run in their order")
        self._frames: list[dict[int, Call]] = []

    def enter(self, hidden: Store) -> None:
        """Run the model up to its blocks; the inputs of the first go to `hidden`."""
        kinds = sorted(set(self.chain.kind))
        for at, batch in enumerate(self.batches):
            frame = {}
            for k, call in blocks.capture(self.chain, self._run(batch), kinds).items():
                frame[k], state = self.chain.split(call)
                if k == 0:
                    hidden.put(at, state)
            self._frames.append(frame)

    def calls(self, k: int, hidden: Store) -> Calls:
        """The calls of block k on these hidden states."""
        return Calls(self.chain, [frame[self.chain.kind[k]] for frame in self._frames], hidden)

    def call(self, k: int, at: int, state: Tensor) -> Call:
        """The call of block k in batch `at` on this hidden state."""
        return self.chain.join(self._frames[at][self.chain.kind[k]], state)

    def hand_on(self, k: int, block: nn.Module, hidden: Store) -> None:
        """Run `block` in the place of block k; what it hands on takes the place of its inputs."""
        for at, call in enumerate(self.calls(k, hidden)):
            hidden.put(at, run(block, call, {})[0])

    def state(self, at: int, hidden: Store) -> Tensor:
        """The hidden state of batch `at`."""
        if (found := hidden.get(at)) is None:
            raise RuntimeError(f"{self.caller}: batch {at} has no hidden state")
        return found

    def counted(self, at: int, x: Tensor) -> Tensor:
        """[T, K]: the tokens of x [batch, length, K], of batch `at`, that count."""
        rows = self.rows[at]
        if rows is None:
            return x.reshape(-1, x.shape[-1])
        if (kept := blocks.tokens_of(x, rows)) is None:
            raise ValueError(f"{self.caller}: an input {list(x.shape)} is not laid out as the attention_mask")
        return kept

    def _run(self, batch: Call) -> Callable[[], Any]:
        return lambda: self.model(*batch.args, **batch.kwargs)


@contextmanager
def calm(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no cache and no gradients, dense layers by the fastest product."""
    with torch.no_grad():
        if not models:
            yield
            return
        with quiet(models[0]), dense_by_onednn(models[0]), calm(*models[1:]):
            yield


def run(block: nn.Module, call: Call, watched: dict[str, nn.Module]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What the block hands on in this call, and the input and the output of layers in it."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, layer: nn.Module, args: tuple, output: Any) -> None:
        seen[name] = (args[0], output)

    handles = [layer.register_forward_hook(partial(see, name)) for name, layer in watched.items()]
    try:
        output = blocks.hidden_state(block(*call.args, **call.kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return output, seen
