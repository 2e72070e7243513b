"""A model's repeated blocks and their inputs, all found by looking, not by name.

    model forward:   embeddings -> block 0 -> block 1 -> ... -> head
                                   ^ capture: run the model up to here once per batch
                                               ^ afterwards block k + 1 is fed with the output of block k

What is assumed of a model is checked on one pass over the whole of it (`learn`): where each block's hidden state comes
in, whether it is the previous block's output, and whose other arguments (masks, rotary embeddings) it shares. Blocks
that break the assumption get their inputs by running the model up to them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern.nn import is_linear

# Blocks whose arguments differ from those of all earlier ones (as full and sliding attention do). A model with more
# kinds passes something that is new in every block, and every block's inputs are captured by running the model.
MAX_KINDS = 4


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple
    kwargs: dict[str, Any]


class Stop(BaseException):
    """Ends a forward pass once all that was wanted is known; no error, so `except Exception` must not see it."""


@dataclass
class Chain:
    """Blocks of one nn.ModuleList that run one after the other, each once per forward.

    hidden: where the hidden state comes in, a position or an argument's name; None when it is not known (one block).
    follows[k]: the hidden state of block k is the output of block k - 1. kind[k]: the first block whose other
    arguments are the same as block k's.
    """

    names: list[str]
    blocks: list[nn.Module]
    hidden: int | str | None
    follows: list[bool]
    kind: list[int]

    def join(self, call: Call, hidden: Tensor | None) -> Call:
        """The call with this hidden state in its place."""
        args, kwargs = call
        if isinstance(self.hidden, int):
            return Call((*args[: self.hidden], hidden, *args[self.hidden + 1 :]), kwargs)
        return Call(args, {**kwargs, self.hidden: hidden} if self.hidden is not None else kwargs)

    def split(self, call: Call) -> tuple[Call, Tensor | None]:
        """The call without its hidden state, and the hidden state; None where it has none, and the call as it is."""
        args, kwargs = call
        if isinstance(self.hidden, int):
            hidden = args[self.hidden] if self.hidden < len(args) else None
        else:
            hidden = kwargs.get(self.hidden) if self.hidden is not None else None
        return (self.join(call, None), hidden) if isinstance(hidden, Tensor) else (call, None)


def find_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost ModuleLists all of whose children hold linear layers (without being one): the repeated blocks."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(name.startswith(outer + ".") for outer, _ in found):
            continue
        if all(not is_linear(child) and any(map(is_linear, child.modules())) for child in module):
            found.append((name, module))
    return found


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every repeated block of the model by its name, in the order of their lists."""
    return [(f"{prefix}.{at}", block) for prefix, found in find_lists(model) for at, block in enumerate(found)]


def learn(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Chain], list[str]]:
    """Run the whole model once by `run()`; return its chains in the order they ran, and the blocks that are no chain.

    The latter are the names of blocks that ran more than once in a forward (shared weights), or not at all. The pass
    ends at the output head: its logits would be the largest tensor of the whole run.
    """
    lists = find_lists(model)
    calls: dict[str, list[tuple[Call, Any]]] = {}
    names = {block: name for name, block in named(model)}

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(names[block], []).append((Call(args, kwargs), output))

    def stop(head: nn.Module, args: tuple) -> None:
        raise Stop

    hooks = [partial(block.register_forward_hook, record, with_kwargs=True) for block in names]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module):
        hooks.append(partial(head.register_forward_pre_hook, stop))
    with hooked(hook() for hook in hooks):
        stopped(run)
    chains, irregular = [], []
    order = {name: at for at, name in enumerate(calls)}
    for name, blocks in lists:
        members = [f"{name}.{at}" for at in range(len(blocks))]
        if any(len(calls.get(member, ())) != 1 for member in members):
            irregular += members
            continue
        # Hooks on outputs fire as blocks finish, so sorting by them gives the order in which the blocks ran.
        members.sort(key=order.__getitem__)
        by_name = {names[block]: block for block in blocks}
        chains.append(_chain(members, [by_name[member] for member in members], [calls[m][0] for m in members]))
    chains.sort(key=lambda chain: order[chain.names[0]])
    return chains, irregular


def capture(chain: Chain, run: Callable[[], Any], blocks: list[int]) -> dict[int, Call]:
    """The calls of these blocks of the chain in the forward that `run()` makes, which stops at the last of them."""
    found: dict[int, Call] = {}
    last = max(blocks)

    def keep(k: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[k] = Call(tuple(map(_no_cache, args)), {key: _no_cache(value) for key, value in kwargs.items()})
            if k == last:
                raise Stop

        return hook

    with hooked(chain.blocks[k].register_forward_pre_hook(keep(k), with_kwargs=True) for k in blocks):
        stopped(run)
    for k in blocks:
        if k not in found:
            raise RuntimeError(f"{chain.names[k]} ran in the first calibration batch, but not in a later one")
    return found


def hidden_state(output: Any) -> Any:
    """What a block hands on: its output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) and output else output


def tokens_of(x: Tensor, rows: Tensor) -> Tensor | None:
    """The tokens of x [batch, length, K] or [batch * length, K] where rows, bool [batch, length], is True: [T, K].

    None when x is laid out in another way.
    """
    if x.ndim > 2 and x.shape[:2] == rows.shape:
        return x[rows.to(x.device)]
    if x.ndim == 2 and len(x) == rows.numel():
        return x[rows.reshape(-1).to(x.device)]
    return None


def stopped(run: Callable[[], Any]) -> Any:
    """`run()`, which a `Stop` may end early."""
    try:
        return run()
    except Stop:
        return None


def linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The dense linear layers inside a module by their full names."""
    return {f"{prefix}.{name}": layer for name, layer in module.named_modules() if name and is_linear(layer)}


def _chain(names: list[str], blocks: list[nn.Module], calls: list[tuple[Call, Any]]) -> Chain:
    count = len(blocks)
    places = [_place(calls[k][0], hidden_state(calls[k - 1][1])) for k in range(1, count)]
    hidden = next((place for place in places if place is not None), None)
    follows = [False, *(place is not None and place == hidden for place in places)]
    kind = list(range(count))
    for k in range(count):
        kind[k] = next((r for r in range(k) if kind[r] == r and _same_but(calls[r][0], calls[k][0], hidden)), k)
    if len(set(kind)) > MAX_KINDS:
        follows, kind = [False] * count, list(range(count))
    return Chain(names, blocks, hidden, follows, kind)


def _place(call: Call, tensor: Any) -> int | str | None:
    """Where in a call this very tensor is an argument."""
    if not isinstance(tensor, Tensor):
        return None
    entries: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    return next((at for at, value in entries if isinstance(value, Tensor) and _alias(value, tensor)), None)


def _no_cache(value: Any) -> Any:
    """None for a key-value cache: it would grow with every call of the block."""
    return None if hasattr(value, "get_seq_length") and hasattr(value, "update") else value


def _alias(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _same_but(a: Call, b: Call, hidden: int | str | None) -> bool:
    """Whether two calls have the same arguments, the hidden state aside."""
    if len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
        return False
    pairs = [(at, x, y) for at, (x, y) in enumerate(zip(a.args, b.args, strict=True))]
    named = [(key, value, b.kwargs[key]) for key, value in a.kwargs.items()]
    return all(at == hidden or _same(x, y) for at, x, y in [*pairs, *named])


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        return all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return all(_same(value, b[key]) for key, value in a.items())
    return isinstance(a, str | int | float | bool) and type(a) is type(b) and a == b


@contextmanager
def hooked(handles: Iterator[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    taken: list[Any] = []
    try:
        taken.extend(handles)
        yield
    finally:
        for handle in taken:
            handle.remove()
