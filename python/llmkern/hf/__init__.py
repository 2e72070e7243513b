"""transformers >= 5 reads and writes packed layers.

    import llmkern                                           # enough for folders that llmkern.save wrote
    model = AutoModelForCausalLM.from_pretrained("folder")   # packed, on llmkern's kernels
    model.save_pretrained("copy")                            # as llmkern.save writes
    llmkern.hf.report(model)                                 # what was packed, what was not and why

    llmkern.hf.use_for("gptq", "awq", "compressed-tensors")  # the checkpoints of others as well, in this process

Importing this imports nothing of transformers: `_hook` waits until somebody else does.
"""

from __future__ import annotations

from typing import Any

from llmkern.hf import _hook
from llmkern.hf._settings import METHODS, Undo, reset, stock, use_for

__all__ = ["METHODS", "LoadConfig", "Undo", "report", "reset", "stock", "use_for"]

_hook.wait()


def report(model: Any) -> Any:
    """The `llmkern.Report` of a model that `from_pretrained` made packed: its layers, and what stayed dense and why.

    Raises ValueError for any other model.
    """
    found = getattr(getattr(model, "hf_quantizer", None), "report", None)
    if found is None:
        raise ValueError(f"report: this {type(model).__name__} was not loaded into packed layers by from_pretrained")
    return found


def __getattr__(name: str) -> Any:
    if name == "LoadConfig":  # a subclass of one of transformers' classes
        from llmkern.hf._quantizer import LoadConfig

        return LoadConfig
    raise AttributeError(f"module 'llmkern.hf' has no attribute {name!r}")
