"""Ops and their kernels: one ordered table per op, and the first row that can run, runs.

Every refusal is a sentence: `why()` lists them, and when no row can run that list is the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from llmkern import _autograd, _features

LIBRARY = torch.library.Library("llmkern", "DEF")
OPS: dict[str, Op] = {}
_forced: ContextVar[str | None] = ContextVar("llmkern_forced", default=None)


class Row(NamedTuple):
    """One line of `llmkern.kernels()`."""

    op: str
    kernel: str
    device: str
    runnable: bool
    reason: str


@dataclass(frozen=True)
class Kernel:
    """A way to run an op.

    `rejects(*args)` returns a sentence when it cannot run on these arguments, `yields(*args)` one when it can, but a
    later row suits them better; a forced kernel is not asked whether it yields. `lacking()` says what the machine
    lacks and is asked only when somebody wants to know: a GPU is not touched at import.
    """

    name: str
    device: str  # "cpu", "cuda" or "any"
    run: Callable[..., Any]
    blocked: str = ""  # why it cannot run in this build, or by the user's wish; empty if it can
    lacking: Callable[[], str] | None = None
    rejects: Callable[..., str | None] | None = None
    yields: Callable[..., str | None] | None = None

    @property
    def reason(self) -> str:
        """Why it cannot run on this machine or build at all; empty if it can."""
        return self.blocked or (self.lacking() if self.lacking else "")

    def refusal(self, device: str, args: tuple) -> str | None:
        """Why this kernel cannot run on these arguments, or None."""
        if self.blocked:
            return self.blocked
        if self.device not in ("any", device):
            return (self.reason if self.lacking else "") or f"needs a {self.device} tensor, got {device}"
        if self.lacking and (lack := self.lacking()):
            return lack
        return self.rejects(*args) if self.rejects else None


@dataclass
class Op:
    """A torch op `llmkern::<name>` with its check, fake, and table of kernels.

    `check(*args)` raises ValueError or TypeError and returns what `fake(checked, *args)` needs to give the result's
    shape and dtype (N for a linear op). Fake and real op share the check, so the two cannot disagree on what is
    legal. `setup_context` and `backward` are those of `torch.library.register_autograd`.
    """

    schema: str
    check: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.schema.split("(", 1)[0]
        # The kernel that `pick` would return for all arguments on a CPU, if there is one: found once, not per call.
        self._unconditional: Callable[..., Any] | None = None
        LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmkern::{self.name}", self._fake, lib=LIBRARY)
        self.op = getattr(torch.ops.llmkern, self.name).default
        if self.backward is not None:
            _autograd.register(self.op, self._run, LIBRARY, backward=self.backward, setup_context=self.setup_context)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def kernel(self, name: str, device: str, *, level: str | None = None, **fields: Any) -> Callable:
        """Decorator: append a row to the table. Rows are tried in the order they were added."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            blocked = fields.pop("reason", "")
            if level in _features.disabled() or name in _features.disabled():
                blocked = f"{name} is disabled by LLMKERN_DISABLE"
            self.kernels.append(Kernel(name, device, run, blocked, **fields))
            first = next((kernel for kernel in self.kernels if not kernel.blocked and kernel.device != "cuda"), None)
            simple = first is not None and first.rejects is None and first.yields is None and first.lacking is None
            self._unconditional = first.run if first is not None and simple else None
            return run

        return add

    def native(self, call: Callable[..., Any], **fields: Any) -> None:
        """Add one row per CPU level that has a native kernel of this op, best level first.

        `call(function, *args)` turns tensors into pointers and calls the native `function`; `fields` are of every row.
        """
        if _features.native is None:
            self.kernel("cpu.native", "cpu", reason=_features.native_error, **fields)(call)
            return
        built = getattr(_features.native, self.name)
        for row in reversed(_features.levels()):
            if function := getattr(built, row.name, None):
                self.kernel(f"cpu.{row.name}", "cpu", level=row.name, reason=row.reason, **fields)(
                    partial(call, function)
                )

    def pick(self, *args: Any) -> Kernel:
        """The kernel that runs on these arguments."""
        device = args[0].device.type
        forced = _forced.get()
        rows = self.kernels if forced is None else [kernel for kernel in self.kernels if kernel.name == forced]
        # Rows of other devices first and cheaply: this runs once per call.
        able = (row for row in rows if row.device in (device, "any") and row.refusal(device, args) is None)
        if (found := next(able, None) if forced else self._choice(able, args)) is not None:
            return found
        raise NotImplementedError(self._no_kernel(forced, *args))

    def why(self, *args: Any) -> str:
        """One line per row: what would run on these arguments, and why each other would not."""
        device = args[0].device.type
        able = [kernel for kernel in self.kernels if kernel.refusal(device, args) is None]
        runs = self._choice(able, args)
        lines = []
        for kernel in self.kernels:
            if kernel is runs:
                text: str | None = "runs"
            elif kernel in able:
                text = kernel.yields(*args) if kernel.yields else None
                text = text or "can run, but comes after the one that runs"
            else:
                text = kernel.refusal(device, args)
            lines.append(f"{self.name}: {kernel.name}: {text}")
        return "\n".join(lines)

    @staticmethod
    def _choice(able: Iterable[Kernel], args: tuple) -> Kernel | None:
        """Of kernels that can run, in the table's order, the one that does.

        The first that does not yield to a later one. A row may be disabled that others yield to: then the last of
        those that do comes before a row that never yields.
        """
        left: Kernel | None = None
        for kernel in able:
            if kernel.yields and kernel.yields(*args):
                left = kernel
            else:
                return kernel if left is None or kernel.yields else left
        return left

    def _no_kernel(self, forced: str | None, *args: Any) -> str:
        if forced is not None and all(kernel.name != forced for kernel in self.kernels):
            return f"{self.name}: force({forced!r}), but this op has no such kernel:\n{self.why(*args)}"
        head = f"force({forced!r}), but it cannot run here" if forced else "no kernel can run"
        return f"{self.name}: {head}:\n{self.why(*args)}"

    def _run(self, *args: Any) -> Any:
        self.check(*args)
        if self._unconditional is not None and args[0].is_cpu and _forced.get() is None:
            return self._unconditional(*args)
        return self.pick(*args).run(*args)

    def _fake(self, *args: Any) -> Any:
        return self.fake(self.check(*args), *args)


def kernels(op: str | None = None) -> list[Row]:
    """Every row of every op's table (or of `op`'s): op, kernel, device, runnable here, and the reason if not."""
    if op is not None and op not in OPS:
        raise ValueError(f"kernels: unknown op {op!r}; known: {', '.join(sorted(OPS))}")
    return [
        Row(name, kernel.name, kernel.device, not kernel.reason, kernel.reason)
        for name in ([op] if op else OPS)
        for kernel in OPS[name].kernels
    ]


def forced() -> str | None:
    """The kernel of the innermost `force` around this, if there is one."""
    return _forced.get()


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run every op inside on the kernel called `name` (e.g. `"cpu.avx2"`), or raise.

    Raises ValueError for a name that no op has, NotImplementedError at the call when it cannot run there.
    """
    known = {kernel.name for op in OPS.values() for kernel in op.kernels}
    if name not in known:
        raise ValueError(f"force: unknown kernel {name!r}; known: {', '.join(sorted(known))}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def refuse_unknown_disabled() -> None:
    """Raise ValueError when LLMKERN_DISABLE names something that does not exist."""
    known = {kernel.name for op in OPS.values() for kernel in op.kernels} | {row.name for row in _features.levels()}
    for name in _features.disabled() - known:
        raise ValueError(f"LLMKERN_DISABLE: unknown name {name!r}; known: {', '.join(sorted(known))}")
