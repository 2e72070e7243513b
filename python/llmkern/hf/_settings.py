"""Which checkpoints transformers reads into packed layers, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

METHODS = ("gptq", "awq", "compressed-tensors")  # the `quant_method` of config.json

_taken: frozenset[str] = frozenset()
_stock: ContextVar[bool] = ContextVar("llmkern_hf_stock", default=False)


class Undo:
    """What `use_for` returns: `with use_for(...):` puts back at its end what was so before."""

    def __init__(self, before: frozenset[str]) -> None:
        self.before = before

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        global _taken
        _taken = self.before


def use_for(*methods: str) -> Undo:
    """From now on, `from_pretrained` reads checkpoints of these methods of others into packed layers as well.

    It holds for the whole process, until `reset()`, or until the end of a `with` around the call. Nothing of the
    packages that made the checkpoints is needed. ValueError for an unknown method.
    """
    global _taken
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"use_for: unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
    undo = Undo(_taken)
    _taken = _taken | set(methods)
    return undo


def reset() -> None:
    """Undo every `use_for`."""
    global _taken
    _taken = frozenset()


@contextmanager
def stock() -> Iterator[None]:
    """Inside, transformers reads and writes everything by itself, as if llmkern were not imported."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


def is_stock() -> bool:
    """Whether this is inside `stock()`."""
    return _stock.get()


def taken() -> frozenset[str]:
    """The methods that `use_for` named."""
    return _taken
