"""Which errors the model's output feels: the gradient by every layer's outputs, gathered before anything is compressed.

The model's own distribution is the target. With a label drawn from it at every position, E[g gᵀ] of the loss's
gradients is the Fisher information, the curvature of the KL divergence from the dense model (as in YAQA, Tseng et al.,
arXiv 2505.22988, and GuidedQuant, Kim et al., arXiv 2505.07004). Kept of it, per layer:

    outputs   Σ g gᵀ over tokens, [N, N] in blocks: which outputs matter, and which errors of two outputs cancel
    tokens    |g| of every token: how much the layer's errors there matter (the weights of its input's Hessian)

The weights would be |g|² if each was known well. From one drawn label they are rough, and squared, few tokens would
carry the Hessian; |g| gave the least perplexity on a real model.

One forward and backward pass, a sequence at a time; a repeated block is run again in the backward pass, so that the
activations of one block are in memory, not of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkern._pages import give_back
from llmkern.blocks import Call, named
from llmkern.calibration import rows_that_count
from llmkern.nn import dense_weight
from llmkern.solvers.output import OutputHessian
from llmkern.streaming import held

# Tokens per forward where a batch can be divided: the logits of each are in memory twice.
TOKENS = 512
ROWS = 64  # of a distribution that labels are drawn from at a time
SEED = 0  # of the labels
ROOM = 1 << 18  # tokens' numbers in one piece of memory


class Unknown(Exception):
    """Why a model has no such gradients."""


class Sensitivity:
    """The gradients of some layers by name.

    outputs: of each layer. tokens: [batch, length] fp32 of each batch, for the layers that every batch ran exactly once
    on all tokens in their order (which experts do not).
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.sizes = {name: len(dense_weight(layer)) for name, layer in layers.items()}
        self.outputs: dict[str, OutputHessian] = {}  # of those that a gradient came to
        self.tokens: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._calls: dict[str, list[Tensor]] = {}
        self._room = torch.empty(0)

    def see(self, name: str, gradient: Tensor) -> None:
        """Add the gradient [..., N] by a layer's outputs in one call."""
        if name not in self.outputs:
            self.outputs[name] = OutputHessian(self.sizes[name], gradient.device)
        self.outputs[name].add(gradient, rough=True)
        self._calls.setdefault(name, []).append(self._together(gradient.float().square().sum(-1)))

    def _together(self, values: Tensor) -> Tensor:
        """A copy, next to those of other layers: scattered over the memory that a block's activations come from, they
        kept it from being used again by the next block, and the process grew by tens of MB per sequence.
        """
        if len(self._room) < values.numel() or self._room.device != values.device:
            self._room = values.new_empty(max(ROOM, values.numel()))
        own, self._room = self._room[: values.numel()], self._room[values.numel() :]
        return own.view(values.shape).copy_(values)

    def end_call(self) -> dict[str, Tensor]:
        """|g|² of the tokens of each layer that was called once since the last time."""
        calls, self._calls = self._calls, {}
        return {name: found[0] for name, found in calls.items() if len(found) == 1 and found[0].ndim > 1}

    def end_batch(self, parts: list[dict[str, Tensor]]) -> None:
        """The calls of one batch, divided along the first dimension, have ended."""
        for name in list(self.tokens):
            if all(name in part for part in parts):
                self.tokens[name].append(torch.cat([part[name] for part in parts]))
            else:
                del self.tokens[name]

    def totals(self) -> dict[str, tuple[float, int]]:
        """Sum and number of the tokens' |g|² by layer."""
        return {
            name: (float(sum(part.sum(dtype=torch.float64) for part in found)), sum(part.numel() for part in found))
            for name, found in self.tokens.items()
        }

    def settle(self, totals: list[dict[str, tuple[float, int]]]) -> None:
        """From |g|² to weights; forget layers that some process does not know. `totals` of all processes."""
        for name in list(self.tokens):
            known = [total[name] for total in totals if name in total]
            mean = sum(part for part, _ in known) / max(sum(count for _, count in known), 1)
            if len(known) < len(totals) or not mean > 0:
                del self.tokens[name]
            else:
                self.tokens[name] = [(part / mean).sqrt() for part in self.tokens[name]]

    def take(self, name: str) -> OutputHessian | None:
        """The outputs of a layer, which are then forgotten; None for one that no gradient came to."""
        found = self.outputs.pop(name, None)
        return found if found is not None and found.tokens else None

    def weights(self, batch: int) -> dict[str, Tensor]:
        """How much the tokens of one batch count, by layer."""
        return {name: found[batch] for name, found in self.tokens.items()}


def gather(model: nn.Module, layers: Mapping[str, nn.Module], batches: Mapping[int, Call], found: Sensitivity) -> None:
    """Add the gradients of these layers, by name, of the dense model over these batches, by their numbers.

    A batch's labels depend on its number alone, not on which process has the batch.

    Raises Unknown: the model's output has no gradient, or one that is not finite.
    """
    with _frozen(model), _blocks_run_again(model), _watched(layers, found), torch.enable_grad():
        for number, batch in batches.items():
            parts, draw = [], torch.Generator().manual_seed(SEED + number)
            for call in _pieces(batch):
                try:
                    output = model(*call.args, **call.kwargs)
                    # What the blocks freed lies between what they keep, too small for what comes now.
                    give_back()
                    target, gradient = _drawn(output, rows_that_count(model, call), draw)
                    target.backward(gradient)
                except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                    raise Unknown(" ".join(str(error).split())) from error
                del output, target, gradient
                parts.append(found.end_call())
            found.end_batch(parts)
    give_back()


def _drawn(output: Any, rows: Tensor | None, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """What to differentiate, and the gradient by it of -log p(label), the label drawn from the model's own p.

    An output that is no logits gets what the squared error of its values would: a random vector.
    """
    logits = getattr(output, "logits", None)
    target = logits if logits is not None else _first_tensor(output)
    if target is None or not target.requires_grad:
        raise Unknown("its output has no gradient")
    if logits is None:
        return target, torch.randn(target.shape, generator=draw).to(target)
    with torch.no_grad():
        p = torch.softmax(logits.detach().float(), -1).view(-1, logits.shape[-1])
        below = torch.rand(len(p), 1, generator=draw).to(p.device)
        for part, chance in zip(p.split(ROWS), below.split(ROWS), strict=True):
            reached = part.cumsum(-1)
            label = torch.searchsorted(reached, chance * reached[:, -1:]).clamp_(max=part.shape[-1] - 1)
            part.scatter_add_(-1, label, part.new_full((len(part), 1), -1.0))
        p = p.view(logits.shape)
        if rows is not None and rows.shape == p.shape[:-1]:
            p *= rows.to(p).unsqueeze(-1)
    return target, p.to(logits.dtype)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)


def _pieces(batch: Call) -> list[Call]:
    """The batch in calls of TOKENS tokens at most, where all it holds are tensors with one row per sequence."""
    values = [*batch.args, *batch.kwargs.values()]
    if not values or not all(isinstance(value, Tensor) and value.ndim >= 2 for value in values):
        return [batch]
    if len({len(value) for value in values}) != 1:
        return [batch]
    count = max(1, TOKENS // max(values[0].shape[1], 1))
    return [
        Call(
            tuple(value[at : at + count] for value in batch.args),
            {key: value[at : at + count] for key, value in batch.kwargs.items()},
        )
        for at in range(0, len(values[0]), count)
    ]


@contextmanager
def _watched(layers: Mapping[str, nn.Module], found: Sensitivity) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def watch(layer: nn.Module, args: tuple, output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:
                output.requires_grad_()  # the first layers: nothing before them has a gradient
            output.register_hook(partial(found.see, name))

        return watch

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name)).remove)
        yield


@contextmanager
def _blocks_run_again(model: nn.Module) -> Iterator[None]:
    """Inside, what a block computes is not kept for the backward pass, but computed again."""
    taken = []
    for _, block in named(model):
        if "forward" not in vars(block):
            block.forward = partial(
                checkpoint, partial(_run, block, block.forward), use_reentrant=False, preserve_rng_state=False
            )
            taken.append(block)
    try:
        yield
    finally:
        for block in taken:
            del block.forward


def _run(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The block's forward, also where its weights are in files: nothing else reads them when it runs again."""
    with held(block):
        return forward(*args, **kwargs)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter has a gradient."""
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in before:
            parameter.requires_grad_(True)
