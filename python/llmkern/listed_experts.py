"""Mixtures of experts that are modules in a list or dict, each with linear layers of its own.

Their layers are found and solved like any others. What is special is calibration from all tokens: which tokens an
expert sees is decided in the forward of the module that runs them, so after that forward every expert runs once more,
on all that the module was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.experts import Experts
from llmkern.nn import is_linear


class ListedExperts:
    """Experts, and the module whose forward runs them: its first argument are the tokens [..., K]."""

    def __init__(self, around: nn.Module, experts: Iterable[nn.Module]) -> None:
        self.around, self.experts = around, tuple(experts)
        self.replaying = False  # while experts run on all tokens; what runs in the forward itself does not count

    def layers(self) -> Iterator[nn.Module]:
        """The linear layers of all experts."""
        return (layer for expert in self.experts for layer in expert.modules() if is_linear(layer))

    @contextmanager
    def counting(self, everything: bool, rows: Tensor | None) -> Iterator[None]:
        """Inside, with `everything`, every expert runs on all tokens after each forward of the module around them.

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

    Siblings are one if they are of one class and hold linear layers, and each of those that run is given one tensor
    whose rows are tokens of the module that runs them.
    """
    candidates = list(_candidates(module))
    tokens: dict[nn.Module, Tensor] = {}
    ran: set[ListedExperts] = set()
    others: set[ListedExperts] = set()  # siblings that turn out to be no mixture

    def around(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens[module] = _tokens(args, kwargs)

    def expert(found: ListedExperts) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ran.add(found)
            if kwargs or len(args) != 1 or not _are_rows(args[0], tokens[found.around]):
                others.add(found)

        return look

    with ExitStack() as stack, torch.no_grad():
        for found in candidates:
            stack.callback(found.around.register_forward_pre_hook(around, with_kwargs=True).remove)
            for child in found.experts:
                stack.callback(child.register_forward_pre_hook(expert(found), with_kwargs=True).remove)
        run()
    return [found for found in candidates if found in ran - others]


def _candidates(module: nn.Module) -> Iterator[ListedExperts]:
    """Siblings of one class in a list or dict, with the module whose forward runs them."""
    for around in module.modules():
        if isinstance(around, Experts):
            continue
        groups = [child for child in around.children() if type(child) in (nn.ModuleList, nn.ModuleDict)]
        if isinstance(around, nn.ModuleDict) and type(around) is not nn.ModuleDict:
            groups.append(around)  # with a forward of its own, as in Switch Transformers and NLLB
        for group in groups:
            siblings = list(group.children())
            alike = len(siblings) > 1 and len(set(map(type, siblings))) == 1
            if alike and all(any(map(is_linear, sibling.modules())) for sibling in siblings):
                yield ListedExperts(around, siblings)


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
