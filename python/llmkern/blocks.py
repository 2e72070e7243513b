"""A model's repeated blocks, their inputs, and which linear layers share one: all found by looking, not by name.

    model forward:   embeddings -> block 0 -> block 1 -> ... -> head
                                   ^ capture: run the model up to here once per batch
                                               ^ afterwards block k + 1 is fed with the output of block k

What is assumed of a model is checked on one pass over the whole of it (`learn`): where each block's hidden state comes
in, whether it is the previous block's output, and whose other arguments (masks, rotary embeddings) it shares. Blocks
that break the assumption get their inputs by running the model up to them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern.experts import Experts
from llmkern.listed_experts import ListedExperts
from llmkern.nn import is_linear
from llmkern.solvers import Hessian

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


def learn(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Chain], list[str]]:
    """Run the whole model once by `run()`; return its chains in the order they ran, and the blocks that are no chain.

    The latter are the names of blocks that ran more than once in a forward (shared weights), or not at all. The pass
    ends at the output head: its logits would be the largest tensor of the whole run.
    """
    lists = find_lists(model)
    calls: dict[str, list[tuple[Call, Any]]] = {}
    names = {block: f"{name}.{at}" for name, blocks in lists for at, block in enumerate(blocks)}

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(names[block], []).append((Call(args, kwargs), output))

    def stop(head: nn.Module, args: tuple) -> None:
        raise Stop

    hooks = [partial(block.register_forward_hook, record, with_kwargs=True) for block in names]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module):
        hooks.append(partial(head.register_forward_pre_hook, stop))
    with _hooks(hook() for hook in hooks):
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

    with _hooks(chain.blocks[k].register_forward_pre_hook(keep(k), with_kwargs=True) for k in blocks):
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


class SharedInputs:
    """Hooks that collect one Hessian per distinct input of some linear layers, while a module runs.

    Layers that are handed the very same tensor (q, k and v; gate and up) share it. `rows`, set before a forward,
    may hold a bool [batch, length] of the tokens to count; others (padding) are left out. `weights`, set likewise, may
    hold fp32 [batch, length] of some layers: how much a token counts in the Hessian of their input, to which the layers
    that share it add up. mixtures: the mixtures of
    experts that may run; with `everything` their layers see every token that counts, not only those routed to them.
    """

    def __init__(
        self, layers: dict[str, nn.Module], mixtures: Iterable[Experts | ListedExperts] = (), everything: bool = False
    ) -> None:
        self.layers = layers
        self.mixtures, self.everything = list(mixtures), everything
        self.unmasked: set[str] = set()  # layers whose input `rows` did not fit, so that padding was counted
        # The tokens of an expert are in no order that `rows` could tell; Experts leaves the others out itself.
        self.routed = {layer for found in self.mixtures if isinstance(found, Experts) for layer in found.layers()}
        listed = [found for found in self.mixtures if everything and isinstance(found, ListedExperts)]
        self._replayed = {layer: found for found in listed for layer in found.layers()}
        self.tokens = dict.fromkeys(layers, 0)
        self.rows: Tensor | None = None
        self.weights: Mapping[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        self._hessians: dict[str, Hessian] = {}
        self._seen: dict[tuple, tuple[str, Tensor]] = {}
        self._inputs: list[tuple[str, Tensor]] = []  # of this forward, by leader
        self._fresh: set[str] = set()  # leaders that first appeared in this forward
        self._order: list[str] = []  # calls of the first forward
        self._last: str | None = None  # where later forwards may stop, if all other layers ran
        self._ran: set[str] = set()  # layers that ran in this forward

    def forward(self, run: Callable[[], Any]) -> None:
        """Run one forward under the hooks. It ends at the last layer: what comes after it has nothing to tell."""
        hooks = (
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self.layers.items()
        )
        with _hooks(hooks), ExitStack() as stack:
            for found in self.mixtures:
                stack.enter_context(found.counting(self.everything, self.rows))
            stopped(run)
        if not self._last and len(self._order) == len(set(self._order)) == len(self.layers):
            self._last = self._order[-1]
        for name, x in self._inputs:
            # Only now are all layers known that share it.
            self._add(name, x, self._weight(name, x))
        self._inputs.clear()
        # Only now: as long as the inputs are held, no address can be used twice.
        self._seen.clear()
        self._fresh.clear()
        self._ran.clear()

    def hessian(self, name: str) -> Hessian | None:
        """The Hessian of a layer's input; None if the layer never ran."""
        if name not in self._leader:
            return None
        leader = self._leader[name]
        if self.tokens[name] != self.tokens[leader]:
            raise RuntimeError(f"{name} and {leader} shared their input in one batch, but not in every batch")
        return self._hessians[leader]

    def shared_by(self) -> dict[str, list[str]]:
        """Leader -> the layers that share its input, itself first."""
        groups: dict[str, list[str]] = {leader: [leader] for leader in self._hessians}
        for name, leader in self._leader.items():
            if name != leader:
                groups[leader].append(name)
        return groups

    def _hook(self, name: str) -> Callable[..., None]:
        def see(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if layer in self._replayed and not self._replayed[layer].replaying:
                return
            self._see(name, args[0] if args else next(iter(kwargs.values())))
            self._ran.add(name)
            if name == self._last and len(self._ran) == len(self.layers):
                raise Stop

        return see

    def _see(self, name: str, x: Tensor) -> None:
        version = 0 if x.is_inference() else x._version
        key = (x.data_ptr(), version, x.shape, x.stride(), x.dtype)
        first, _ = self._seen.setdefault(key, (name, x))
        kept = self._counted(name, x)
        self._order.append(name)
        self.tokens[name] += kept.numel() // max(kept.shape[-1], 1)
        if name not in self._leader:
            # A layer that joins later than its leader (an expert) has missed earlier batches: it gets its own Hessian.
            joins = first != name and self._leader.get(first) == first and first in self._fresh
            self._leader[name] = first if joins else name
            if not joins:
                self._hessians[name] = Hessian(x.shape[-1], x.device)
                self._fresh.add(name)
        leader = self._leader[name]
        if leader == name:
            if kept.numel() and self.weights:
                self._inputs.append((name, x.clone()))  # what comes next may write to it
            elif kept.numel():
                self._add(name, x, None)
        elif first != leader:
            raise RuntimeError(f"{name} and {leader} shared their input in one batch, but not in every batch")

    def _counted(self, name: str, x: Tensor) -> Tensor:
        """The tokens of x [batch, length, K] or [batch * length, K] that count."""
        rows = self.rows
        if rows is None or self.layers[name] in self.routed or self.layers[name] in self._replayed:
            return x
        kept = tokens_of(x, rows)
        if kept is None:
            self.unmasked.add(name)
        return x if kept is None else kept

    def _weight(self, name: str, x: Tensor) -> Tensor | None:
        """fp32 [..., 1]: how much each token of x counts, for the layer and those that share its input."""
        sharing = [other for other, leader in self._leader.items() if leader == name and other in self.weights]
        known = [self.weights[other] for other in sharing if self.weights[other].shape == x.shape[:-1]]
        return torch.stack(known).sum(0).unsqueeze(-1) if known else None

    def _add(self, name: str, x: Tensor, weight: Tensor | None) -> None:
        tokens = self._counted(name, x if weight is None else x * weight.to(x.device).sqrt())
        try:
            self._hessians[name].add(tokens)
        except ValueError as error:
            raise ValueError(f"the input of layer {name}: {error}") from None


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
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    taken: list[Any] = []
    try:
        taken.extend(handles)
        yield
    finally:
        for handle in taken:
            handle.remove()
