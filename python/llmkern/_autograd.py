"""The gradient of an op, with a short way for calls that need none.

torch.library's own autograd kernel is Python and dispatches the op a second time, about 4 us a call: as much as the
work of a small layer. Calls on plain CPU or CUDA tensors that need no gradient run the op directly; tracing, functorch,
subclasses, modes and other devices show in the dispatch keys and go torch's way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload


def register(
    op: OpOverload, run: Callable[..., Any], library: torch.library.Library, *, backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> None:  # fmt: skip
    """torch.library.register_autograd for `op`, whose kernel is `run`; backward and setup_context are as there."""
    try:
        from torch._library.autograd import Info, make_autograd_impl

        key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
        pairs = ((key.CPU, key.AutogradCPU), (key.CUDA, key.AutogradCUDA))
        plain = tuple((keys(backend) | keys(autograd)).raw_repr() for backend, autograd in pairs)
        any_requires_grad = torch._C._any_requires_grad
        full = make_autograd_impl(op, Info(_backward_fn=backward, _setup_context_fn=setup_context))
    except (ImportError, AttributeError, TypeError):  # not public in torch: a version without them loses only the time
        torch.library.register_autograd(op, backward, setup_context=setup_context, lib=library)
        return
    grad_enabled = torch.is_grad_enabled

    def autograd(keyset: Any, *args: Any) -> Any:
        if keyset.raw_repr() in plain and not (grad_enabled() and any_requires_grad(*args)):
            return run(*args)
        return full(keyset, *args)

    library.impl(op._opname, autograd, "Autograd", with_keyset=True)
