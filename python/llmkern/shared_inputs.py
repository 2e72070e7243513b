"""Which linear layers of a module share an input, and what its tokens add up to: found by looking, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern.blocks import Stop, hooked, stopped, tokens_of
from llmkern.experts import Experts
from llmkern.listed_experts import ListedExperts
from llmkern.solvers import Hessian, InputShift


class DenseRun(NamedTuple):
    """A forward of the dense model, and how many tokens its batch has.

    finish: takes what the forward returns, which then goes on to its end; None where nobody wants that.
    """

    run: Callable[[], Any]
    tokens: int
    finish: Callable[[Any], None] | None = None


class SharedInputs:
    """Hooks that collect one Hessian per distinct input of some linear layers, while a module runs.

    Layers that are handed the very same tensor (q, k and v; gate and up) share it. `rows`, set before a forward,
    may hold a bool [batch, length] of the tokens to count; others (padding) are left out. `weights`, set likewise, may
    hold fp32 [batch, length] of some layers: how much a token counts in the Hessian of their input, to which the layers
    that share it add up. mixtures: the mixtures of experts that may run; with `everything` their layers see every token
    that counts, not only those routed to them. With `shifts`, how the inputs differ from the dense model's is collected
    as well.
    """

    def __init__(
        self, layers: dict[str, nn.Module], mixtures: Iterable[Experts | ListedExperts] = (), everything: bool = False,
        shifts: bool = False,
    ) -> None:  # fmt: skip
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
        self.with_shifts = shifts
        self._shifts: dict[str, InputShift] = {}
        self._seen: dict[tuple, tuple[str, Tensor]] = {}
        self._inputs: list[tuple[str, Tensor]] = []  # of this forward, by leader
        self._fresh: set[str] = set()  # leaders that first appeared in this forward
        self._order: list[str] = []  # calls of the first forward
        self._last: str | None = None  # where later forwards may stop, if all other layers ran
        self._ran: set[str] = set()  # layers that ran in this forward

    def forward(self, run: Callable[[], Any], dense: DenseRun | None = None) -> None:
        """Run one forward under the hooks. It ends at the last layer: what comes after it has nothing to tell.

        dense: the same forward of the dense model, which the inputs are compared with.
        """
        hooks = (
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self.layers.items()
        )
        with hooked(hooks), ExitStack() as stack:
            for found in self.mixtures:
                stack.enter_context(found.counting(self.everything, self.rows))
            stopped(run)
        if not self._last and len(self._order) == len(set(self._order)) == len(self.layers):
            self._last = self._order[-1]
        # Only now are all layers known that share it.
        weighted = [(name, x, self._weight(name, x)) for name, x in self._inputs]
        for name, x, weight in weighted:
            self._add(name, x, weight)
        if dense is not None:
            self._compare(weighted, dense)
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

    def shift(self, name: str) -> InputShift | None:
        """How a layer's inputs differ from the dense model's, over the tokens for which that is known."""
        leader = self._leader.get(name)
        return None if leader is None else self._shifts.get(leader)

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
            if kept.numel() and (self.weights or self.with_shifts):
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

    def _compare(self, inputs: list[tuple[str, Tensor, Tensor | None]], dense: DenseRun) -> None:
        """Run the dense model's forward, and add up how its inputs differ from these.

        A token must be the same in both, so only inputs count that hold all of a batch's tokens: those that were routed
        to an expert are others in each.
        """
        waiting: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        for name, x, weight in inputs:
            if x.shape[:-1].numel() == dense.tokens:
                waiting.setdefault(name, []).append((x, weight))

        def hook(name: str) -> Callable[..., None]:
            def see(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                reference = args[0] if args else next(iter(kwargs.values()))
                if name not in waiting:
                    return
                x, weight = waiting[name].pop(0)
                if not waiting[name]:
                    del waiting[name]
                if reference.shape == x.shape:
                    self._add_shift(name, reference, x, weight)
                if not waiting and dense.finish is None:
                    raise Stop

            return see

        if waiting:
            hooks = (self.layers[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in waiting)
            with hooked(hooks):
                output = stopped(dense.run)
            if dense.finish is not None:
                dense.finish(output)

    def _add_shift(self, name: str, reference: Tensor, x: Tensor, weight: Tensor | None) -> None:
        if name not in self._shifts:
            self._shifts[name] = InputShift(x.shape[-1], x.device)
        dense, own = (self._counted(name, part).reshape(-1, x.shape[-1]) for part in (reference, x))
        if weight is not None:
            weight = self._counted(name, weight.to(x.device)).reshape(-1, 1)
        self._shifts[name].add(dense, own, weight, rough=True)

    def _add(self, name: str, x: Tensor, weight: Tensor | None) -> None:
        tokens = self._counted(name, x if weight is None else x * weight.to(x.device).sqrt())
        try:
            self._hessians[name].add(tokens)
        except ValueError as error:
            raise ValueError(f"the input of layer {name}: {error}") from None
