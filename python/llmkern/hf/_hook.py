"""Lets llmkern.hf into transformers as soon as both are imported, in either order; imports neither.

transformers has no discovery of plug-ins (no entry points), so the module with `PreTrainedModel` is watched: if it is
imported already, now; else when it has been executed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.modeling_utils"


def wait() -> None:
    """Install now where transformers is imported, else once it is."""
    if TARGET in sys.modules:
        # Waits where another thread is in the middle of that import.
        _install(importlib.import_module(TARGET))
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing but TARGET, as the finders after it do, and sees to what follows its execution."""

    asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)  # an error leaves the finder in place, for the next attempt
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _install(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _install(module: ModuleType) -> None:
    """Never an error: transformers is usable without llmkern."""
    try:
        from llmkern.hf import _intercept

        _intercept.install(module)
    except Exception as error:
        warnings.warn(
            f"llmkern: this transformers is not known ({type(error).__name__}: {error}); its from_pretrained does not "
            "read folders of llmkern as packed layers, llmkern.load does",
            stacklevel=2,
        )
