"""llmkern: prune, quantize and distil transformer models, and run the result on native kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmkern import formats, hf, ops
from llmkern._registry import force, kernels, refuse_unknown_disabled
from llmkern._version import __version__
from llmkern._why import why
from llmkern.ops._tuning import autotune

if TYPE_CHECKING:
    from llmkern import checkpoints, distill, prune, solvers
    from llmkern.checkpoint import load, save
    from llmkern.patching import patch, unpatch
    from llmkern.pipeline import compress
    from llmkern.planning import plan
    from llmkern.recipe import Recipe
    from llmkern.report import Report
    from llmkern.streaming import stream

__all__ = [
    "Recipe",
    "Report",
    "__version__",
    "autotune",
    "checkpoints",
    "compress",
    "distill",
    "force",
    "formats",
    "hf",
    "kernels",
    "load",
    "ops",
    "patch",
    "plan",
    "prune",
    "save",
    "solvers",
    "stream",
    "unpatch",
    "why",
]

refuse_unknown_disabled()

# Loaded at first use, so that `import llmkern` costs little more than `import torch`.
_LAZY = {
    "Recipe": "recipe",
    "Report": "report",
    "compress": "pipeline",
    "load": "checkpoint",
    "patch": "patching",
    "plan": "planning",
    "save": "checkpoint",
    "stream": "streaming",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoints", "distill", "prune", "solvers"):
        return importlib.import_module(f"llmkern.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'llmkern' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmkern.{_LAZY[name]}"), name)
