"""Mixtures of experts that are modules in a list, each with linear layers of its own.

Their layers are found and solved like any others. What is special is calibration from all tokens: which tokens an
expert sees is decided in the forward of the module around the list, so after that forward every expert runs once more,
on all that the module was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.nn import is_linear


class ListedExperts:
    """The experts of one list, and the module around it, whose first argument are the tokens [..., K]."""

    def __init__(self, around: nn.Module, listed: nn.ModuleList) -> None:
        self.around, self.experts = around, listed
        self.replaying = False  # while experts run on all tokens; what runs in the forward itself does not count

    def layers(self) -> Iterator[nn.Module]:
        """The linear layers of all experts."""
        return (layer for layer in self.experts.modules() if is_linear(layer))

    @contextmanager
    def counting(self, everything: bool, rows: Tensor | None) -> Iterator[None]:
        """Inside, with `everything`, every expert runs on all tokens after each forward of the module around it.

        rows: bool [batch, length] of the tokens that count, or None for all.
        """
        if not everything:
            yield
            return

        def replay(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x = _tokens(args, kwargs)
            if rows is not None and rows.numel() == len(x):
                x = x[rows.reshape(-1).to(x.device)]
            self.replaying = True
            try:
                for expert in self.experts:
                    expert(x)
            finally:
                self.replaying = False

        handle = self.around.register_forward_hook(replay, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def find(module: nn.Module, run: Callable[[], Any]) -> list[ListedExperts]:
    """The mixtures inside `module`, which `run()` runs once.

    A list is one if its children are of one class and hold linear layers, and each of those that run is given one
    tensor whose rows are tokens of the module around the list.
    """
    candidates = [
        ListedExperts(around, listed)
        for around in module.modules()
        for listed in around.children()
        if isinstance(listed, nn.ModuleList)
        and len(listed) > 1
        and len({type(child) for child in listed}) == 1
        and all(any(map(is_linear, child.modules())) for child in listed)
    ]
    tokens: dict[nn.Module, Tensor] = {}
    ran: set[nn.ModuleList] = set()
    others: set[nn.ModuleList] = set()  # lists that turn out to be no mixture

    def around(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens[module] = _tokens(args, kwargs)

    def expert(found: ListedExperts) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ran.add(found.experts)
            if kwargs or len(args) != 1 or not _are_rows(args[0], tokens[found.around]):
                others.add(found.experts)

        return look

    with ExitStack() as stack, torch.no_grad():
        for found in candidates:
            stack.callback(found.around.register_forward_pre_hook(around, with_kwargs=True).remove)
            for child in found.experts:
                stack.callback(child.register_forward_pre_hook(expert(found), with_kwargs=True).remove)
        run()
    return [found for found in candidates if found.experts in ran - others]


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first tensor [..., K] of a call as [tokens, K]; empty if there is none."""
    found = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)
    x = next(found, torch.empty(0, 0))
    return x.reshape(-1, x.shape[-1]) if x.numel() else x


def _are_rows(x: Any, tokens: Tensor) -> bool:
    """Whether the first and the last row of x are among the tokens."""
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] != tokens.shape[-1]:
        return False
    ends = x.reshape(-1, x.shape[-1])[[0, -1]] if x.numel() else x[:0]
    return all(bool((tokens == row).all(-1).any()) for row in ends)
