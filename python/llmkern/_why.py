"""`llmkern.why`: which kernel would run, and why each other would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmkern._registry import OPS
from llmkern.ops import linear_args

if TYPE_CHECKING:
    from llmkern.formats import PackedWeight


def why(op: str | Callable, x: Tensor, w: PackedWeight | Tensor, *rest: Any) -> str:
    """One line per kernel of `op` (a name such as "int4_linear", or the function), for x and a packed weight.

    Plain-tensor ops (the solver's blocks) take their own arguments after `op`. Raises ValueError for an unknown op.
    """
    name = op if isinstance(op, str) else getattr(op, "name", getattr(op, "__name__", repr(op)))
    if name == "linear":
        name = w.ops[0]  # type: ignore[union-attr]
    if name not in OPS:
        raise ValueError(f"why: unknown op {name!r}; known: {', '.join(sorted(OPS))}")
    args = (x, w, *rest) if isinstance(w, Tensor) else linear_args(name, x, w, rest[0] if rest else None)
    return OPS[name].why(*args)
