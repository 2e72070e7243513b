"""Restoration block by block: what a block of the smaller model reads is refitted to what the dense block gives.

Both on the same inputs, those that the blocks before, as restored, hand on. So an error of an earlier block is not
fitted a second time. A block whose next ones are removed comes closest to what these would have handed on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._progress import Progress
from llmkern.activations import Calls, Store
from llmkern.blocks import Call
from llmkern.experts import ROUNDING
from llmkern.nn import dense_weight, is_conv1d
from llmkern.prune import parts
from llmkern.prune.durable import Durable
from llmkern.prune.narrow import Cut
from llmkern.prune.removed import Removed, StructuredReport
from llmkern.prune.restore import Fit
from llmkern.prune.walk import Walk, run

CALLER = "apply_structured"


class Restoration:
    """One restoration: the cut, the smaller model with the tensors that stay, and the data."""

    def __init__(self, cut: Cut, small: nn.Module, walk: Walk, hidden: Store, report: StructuredReport) -> None:
        """hidden: the inputs of the first block; what each block hands on takes their place."""
        self.cut, self.walk, self.hidden, self.report = cut, walk, hidden, report
        self.small = list(small.get_submodule(cut.name).children())

    def describe(self) -> None:
        """Check that what was cut is what was meant, and report what was cut, with no restoration."""
        self._check()
        for at in range(len(self.small)):
            self.report.rows += [row for row, _ in self._rows(at, ())]

    def run(self, damp: float, kept: Durable, progress: bool) -> None:
        """Check that what was cut is what was meant, and restore with this damping what is not kept already."""
        self._check()
        if first := self.cut.indices[0]:
            self._note(range(first), "no block stands before")
        bar = Progress(CALLER, len(self.small), progress)
        for at, block in enumerate(self.small):
            gone = self.cut.removed_after(at)
            fitted: dict[str, Tensor] = {}
            known = kept.read(at) if at < kept.done else None
            for row, reader in self._rows(at, gone):
                layer = block.get_submodule(reader)
                if known is None:
                    # The last reader of the block: what it adds is what the block hands on.
                    self._refit(at, reader, gone if row.blocks else (), damp, row)
                    fitted |= _to_keep(reader, layer, row)
                else:
                    _recall(reader, layer, row, known)
                self.report.rows.append(row)
            if known is None:
                kept.write(at, fitted)
            if at + 1 < len(self.small):
                self.walk.hand_on(self.cut.indices[at], block, self.hidden)
            bar.step(f"{self.cut.name}.{at}")

    def _rows(self, at: int, gone: Sequence[int]) -> list[tuple[Removed, str]]:
        """What is to be restored in block `at`, and by which of its layers; `gone`: the removed blocks after it."""
        name = f"{self.cut.name}.{at}"
        rows = []
        for part, units in self.cut.units(at):
            what = "channels" if part is self.cut.channels else "heads"
            rows.append((Removed(f"{name}.{part.reader}", what, len(units), part.units), part.reader))
        if not gone:
            return rows
        mlp = parts.channels(self.cut.block(at))
        reason = mlp if isinstance(mlp, str) else self._does_not_add(at, mlp.reader)
        if reason or isinstance(mlp, str):
            self._note(gone, f"{self.cut.kept[at].name}: {reason}")
            return rows
        if not rows or rows[-1][1] != mlp.reader:
            rows.append((Removed(f"{name}.{mlp.reader}", "channels", mlp.units, mlp.units), mlp.reader))
        rows[-1][0].blocks = self._names(gone)
        return rows

    def _note(self, gone: Sequence[int], reason: str) -> None:
        note = f"nothing makes up for {', '.join(self._names(gone))}: {reason}"
        warnings.warn(f"{CALLER}: {note}", stacklevel=4)
        self.report.notes.append(note)

    def _names(self, gone: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"{self.cut.name}.{k}" for k in gone)

    def _calls(self, at: int) -> Calls:
        return self.walk.calls(self.cut.indices[at], self.hidden)

    def _first_call(self, at: int) -> Call:
        return self._calls(at)[0]

    def _check(self) -> None:
        """ValueError unless the first block, cut, gives what the dense one gives without the units."""
        dense, handles = self.cut.block(0), []
        for part, units in self.cut.units(0):
            mask = torch.zeros(part.units * part.unit)
            mask[part.columns(units)] = 1

            def masked(layer: nn.Module, args: tuple, mask: Tensor = mask) -> tuple:
                return (args[0] * mask.to(args[0]), *args[1:])

            handles.append(dense.get_submodule(part.reader).register_forward_pre_hook(masked))
        try:
            wanted, _ = run(dense, self._first_call(0), {})
        finally:
            for handle in handles:
                handle.remove()
        got, _ = run(self.small[0], self._first_call(0), {})
        if off := _distance(got, wanted):
            raise ValueError(
                f"{CALLER}: {self.cut.kept[0].name} without the units differs from the dense block without them"
                f" by {off:.1e} of its output: its layers are not connected as their names say"
            )

    def _does_not_add(self, at: int, reader: str) -> str:
        """Why what a layer gives is not simply added to what the block hands on; "" if it is, as a try shows."""
        block = self.small[at]
        before, _ = run(block, self._first_call(at), {})
        more = before.flip(-1)

        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + more.reshape(output.shape)

        handle = block.get_submodule(reader).register_forward_hook(add)
        try:
            after, _ = run(block, self._first_call(at), {})
        finally:
            handle.remove()
        return f"what {reader} gives is not simply added to its output" if _distance(after, before + more) else ""

    def _refit(self, at: int, reader: str, gone: Sequence[int], damp: float, row: Removed) -> None:
        """Fit a layer to what it gives in the dense block, or its block to what the blocks up to the last of `gone` do.

        Its corrections go to the layer, the errors to the row.
        """
        dense, block = self.cut.block(at), self.small[at]
        layer: Any = block.get_submodule(reader)
        n, k = dense_weight(layer).shape
        fit = Fit(n, k, layer.weight.device, layer.bias is not None)
        for number, call in enumerate(self._calls(at)):
            whole, seen = run(dense, call, {reader: dense.get_submodule(reader)})
            left, now = run(block, call, {reader: layer})
            x, got = (self.walk.counted(number, tokens).float() for tokens in now[reader])
            if gone:
                for other in gone:
                    whole, _ = run(self.cut.all_blocks()[other], self.walk.call(other, number, whole), {})
                missing = self.walk.counted(number, whole).float() - self.walk.counted(number, left).float()
            else:
                missing = self.walk.counted(number, seen[reader][1]).float() - got
            try:
                fit.add(x, missing, got + missing)
            except ValueError as error:
                raise ValueError(f"{CALLER}: the input of {row.layer}: {error}") from None
        found = fit.solve(damp)
        layer.weight.add_(found.weight.T if is_conv1d(layer) else found.weight)
        if found.bias is not None:
            layer.bias.add_(found.bias)
        row.error_before, row.error_after, row.notes = found.before, found.after, found.notes


def _to_keep(reader: str, layer: Any, row: Removed) -> dict[str, Tensor]:
    """What restoration made of a layer and its row, as tensors."""
    found = {
        f"{reader}.errors": torch.tensor([row.error_before, row.error_after], dtype=torch.float64),
        f"{reader}.notes": torch.tensor(list(json.dumps(row.notes).encode()), dtype=torch.uint8),
    }
    return found | {f"{reader}.{name}": value.detach() for name, value in layer.named_parameters(recurse=False)}


def _recall(reader: str, layer: Any, row: Removed, found: Mapping[str, Tensor]) -> None:
    """Put what `_to_keep` gave where it was."""
    for name, value in layer.named_parameters(recurse=False):
        value.copy_(found[f"{reader}.{name}"])
    row.error_before, row.error_after = found[f"{reader}.errors"].tolist()
    row.notes = tuple(json.loads(bytes(found[f"{reader}.notes"].tolist())))


def _distance(a: Tensor, b: Tensor) -> float:
    """The norm of a - b relative to that of b; 0 where rounding explains it."""
    off = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
    return 0.0 if off <= ROUNDING.get(a.dtype, ROUNDING[torch.float32]) else off
