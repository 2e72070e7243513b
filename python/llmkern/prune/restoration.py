"""Restoration block by block: what a block of the smaller model reads is refitted to what the dense block gives.

Both on the same inputs, those that the blocks before, as restored, hand on. So an error of an earlier block is not
fitted a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._progress import Progress
from llmkern.activations import Store
from llmkern.experts import ROUNDING
from llmkern.nn import dense_weight, is_conv1d
from llmkern.prune import parts
from llmkern.prune.narrow import Cut
from llmkern.prune.parts import Part
from llmkern.prune.removed import Removed, StructuredReport
from llmkern.prune.restore import Fit
from llmkern.prune.walk import Walk, run


class Restoration:
    """One restoration: the cut, the smaller model with the tensors that stay, and the data."""

    def __init__(self, cut: Cut, small: nn.Module, walk: Walk, hidden: Store, report: StructuredReport) -> None:
        """hidden: the inputs of the first block; what each block hands on takes their place."""
        self.cut, self.walk, self.hidden, self.report = cut, walk, hidden, report
        self.small = list(small.get_submodule(cut.name).children())

    def run(self, damp: float | None, progress: bool) -> None:
        """Check that what was cut is what was meant, and restore with this damping; None for no restoration."""
        bar = Progress("apply_structured", len(self.small), progress)
        for at, block in enumerate(self.small):
            if at == 0:
                self._check()
            for part, units in self.cut.units(at):
                what = "channels" if part is self.cut.channels else "heads"
                row = Removed(f"{self.cut.name}.{at}.{part.reader}", what, len(units), part.units)
                self.report.rows.append(row)
                if damp is not None:
                    self._restore(at, part, damp, row)
            if damp is not None and (gone := self.cut.removed_after(at)):
                self._make_up(at, gone, damp)
            if damp is not None and at + 1 < len(self.small):
                for number, call in enumerate(self._calls(at)):
                    self.hidden.put(number, run(block, call, {})[0])
            bar.step(f"{self.cut.name}.{at}")

    def _calls(self, at: int) -> Any:
        return self.walk.calls(self.cut.indices[at], self.hidden)

    def _check(self) -> None:
        """ValueError unless the first block, cut, gives what the dense one gives without the units."""
        dense, first = self.cut.block(0), self._calls(0)[0]
        handles = []
        for part, units in self.cut.units(0):
            mask = torch.zeros(part.units * part.unit)
            mask[part.columns(units)] = 1

            def masked(layer: nn.Module, args: tuple, mask: Tensor = mask) -> tuple:
                return (args[0] * mask.to(args[0]), *args[1:])

            handles.append(dense.get_submodule(part.reader).register_forward_pre_hook(masked))
        try:
            wanted, _ = run(dense, first, {})
        finally:
            for handle in handles:
                handle.remove()
        got, _ = run(self.small[0], first, {})
        off = float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
        if not off <= ROUNDING.get(got.dtype, ROUNDING[torch.float32]):
            raise ValueError(
                f"apply_structured: {self.cut.kept[0].name} without the units differs from the dense block without them"
                f" by {off:.1e} of its output: its layers are not connected as their names say"
            )

    def _make_up(self, at: int, gone: Sequence[int], damp: float) -> None:
        """Fit the last reader of a block to what the dense blocks up to the next one that stays give."""
        part = parts.channels(self.cut.block(at))
        assert isinstance(part, Part)
        block = self.small[at]
        layer: Any = block.get_submodule(part.reader)
        row = Removed(f"{self.cut.name}.{at}.{part.reader}", "blocks", 1, 1 + len(gone))
        n, k = dense_weight(layer).shape
        fit = Fit(n, k, layer.weight.device, layer.bias is not None)
        for number, call in enumerate(self._calls(at)):
            wanted, _ = run(self.cut.block(at), call, {})
            for other in gone:
                wanted, _ = run(self.cut.all_blocks()[other], self.walk.call(other, number, wanted), {})
            left, seen = run(block, call, {part.reader: layer})
            x, got = seen[part.reader]
            e = wanted.float() - left.float()
            x, e, w = (self.walk.counted(number, tokens) for tokens in (x, e, e + got.float()))
            fit.add(x, e, w)
        self._correct(layer, fit, damp, row)
        self.report.rows.append(row)

    def _restore(self, at: int, part: Part, damp: float, row: Removed) -> None:
        """Fit the layer that reads the part to what the dense block gives there."""
        dense, block = self.cut.block(at), self.small[at]
        layer: Any = block.get_submodule(part.reader)
        n, k = dense_weight(layer).shape
        fit = Fit(n, k, layer.weight.device, layer.bias is not None)
        for number, call in enumerate(self._calls(at)):
            _, whole = run(dense, call, {part.reader: dense.get_submodule(part.reader)})
            _, left = run(block, call, {part.reader: layer})
            (_, wanted), (x, got) = whole[part.reader], left[part.reader]
            x, got, wanted = (self.walk.counted(number, tokens) for tokens in (x, got, wanted))
            try:
                fit.add(x, wanted.float() - got.float(), wanted)
            except ValueError as error:
                raise ValueError(f"apply_structured: the input of {row.layer}: {error}") from None
        self._correct(layer, fit, damp, row)

    @staticmethod
    def _correct(layer: Any, fit: Fit, damp: float, row: Removed) -> None:
        """Add what was fitted to the layer, and the errors to the report."""
        found = fit.solve(damp)
        layer.weight.add_(found.weight.T if is_conv1d(layer) else found.weight)
        if found.bias is not None:
            layer.bias.add_(found.bias)
        row.error_before, row.error_after, row.notes = found.before, found.after, found.notes
