"""Groups of layers are solved, and what comes out goes into the report, the state and the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from llmkern._progress import Progress
from llmkern.blocks import Call
from llmkern.distributed import Group, team
from llmkern.fingerprint import fingerprint
from llmkern.fisher import Sensitivity
from llmkern.nn import is_conv1d
from llmkern.patching import solve_and_keep, swap_all
from llmkern.recipe import Recipe
from llmkern.report import Report
from llmkern.solved import Solved, decode
from llmkern.state import NoState, State
from llmkern.streaming import held, read_bias

NO_SENSITIVITY = "measured by the layer's own error: what the model's output feels of it is not known"
NO_SHIFT = "does not make up for errors of its input: the dense model's cannot be told token by token"
NO_NOTES: Mapping[str, str] = MappingProxyType({})
REMEDIES = 'give data that reaches it, calibrate experts from all tokens (experts="all"), or ignore it'
UNMASKED = "its input is not laid out as the attention_mask: tokens of padding counted too"


class LayerSolver:
    """The layers of one compression: what each gets, on whatever ranks there are, and what is finished.

    sensitivity: what the model's output feels of the layers, once it is known. unmasked: layers whose padding counted.
    """

    def __init__(
        self, model: nn.Module, chosen: dict[str, Recipe], report: Report, *, strict: bool, progress: bool
    ) -> None:
        self.model, self.chosen, self.report, self.strict = model, chosen, report, strict
        self.team = team(model)
        self.bar = Progress(report.recipe, len(chosen), progress and self.team.rank == 0)
        self.state: State | NoState = NoState()
        self.done: frozenset[str] = frozenset()  # parts of the state
        self.sensitivity: Sensitivity | None = None
        self.unmasked: set[str] = set()

    def open(
        self, recipe: Recipe, batches: list[Call], folder: str | Path | None, device: torch.device | None
    ) -> State | NoState:  # fmt: skip
        """The state to close at the end; what is in it already will not be solved again."""

        @cache
        def about() -> dict[str, Any]:
            return fingerprint(self.model, recipe, batches, device, values=folder is not None)

        def start() -> tuple[tuple[str, ...], tuple[str, ...]]:
            if folder is not None:
                self.state = State(folder, about(), self.team.size)
            return self.state.parts, self.state.notes

        self.team.check_same(about)
        done, notes = self.team.from_first(start)
        self.done = frozenset(done)
        self.report.notes += notes
        if self.team.size > 1:
            self.report.notes.append(f"calibrated and solved on {self.team.size} ranks")
        return self.state

    def solve(
        self, groups: list[Group], notes: Mapping[str, str] = NO_NOTES, needs_data: bool = True, runs_on: bool = False
    ) -> Iterator[dict[str, Solved]]:
        """Solve these groups, one after the other; nothing is put in place yet. runs_on: keep the dense values."""

        def solve(group: Group) -> dict[str, Solved]:
            solved = {}
            for name in group.names:
                layer = self.model.get_submodule(name)
                if needs_data and (group.hessian is None or not group.hessian.tokens):
                    raise ValueError(f"compress: layer {name} saw no calibration tokens; {REMEDIES}")
                recipe = self.chosen[name]
                output = self.sensitivity.take(name) if self.sensitivity and recipe.by_model else None
                with held(layer):
                    packed, row, solution = solve_and_keep(
                        "compress", name, layer, group.hessian, recipe, output, group.shift
                    )
                if needs_data and recipe.by_model and output is None:
                    row.notes = (*row.notes, NO_SENSITIVITY)
                if needs_data and row.tokens < packed.in_features:
                    row.notes = (*row.notes, f"{row.tokens} calibration tokens for {packed.in_features} input features")
                if name in self.unmasked:
                    row.notes = (*row.notes, UNMASKED)
                if name in notes:
                    row.notes = (*row.notes, notes[name])
                if needs_data and recipe.correction and group.shift is None:
                    row.notes = (*row.notes, NO_SHIFT)
                solved[name] = Solved(packed, row, solution.weight if runs_on else None)
            return solved

        for solved in self.team.solve(groups, solve):
            self._take(solved)
            yield solved

    def _take(self, solved: dict[str, Solved]) -> None:
        """Into the report."""
        for name, layer in solved.items():
            if self.strict and layer.row.problems:
                raise ValueError(f"compress: layer {name}: {'; '.join(layer.row.problems)} (strict)")
            self.report.rows.append(layer.row)
            self.bar.step(name)

    def run_dense(self, solved: dict[str, Solved]) -> dict[str, Solved]:
        """Give the dense layers the values of their solutions, which are then not kept a second time."""
        for name, layer in solved.items():
            dense, values = self.model.get_submodule(name), layer.values()
            dense.weight.copy_(values.T if is_conv1d(dense) else values)  # type: ignore[operator]
        return {name: replace(layer, dense=None) for name, layer in solved.items()}

    def replace_all(self, groups: list[Group], notes: Mapping[str, str] = NO_NOTES, needs_data: bool = True) -> None:
        """Solve these groups, each a part of the state, and put their packed layers in place.

        Dense weights stay: nothing runs them, and that of a tied head is the embeddings' too.
        """
        todo = []
        while groups:  # a list that nobody empties would keep the Hessians
            group = groups.pop(0)
            part = group.names[0]
            if part in self.done:
                self.swap(self.restored(part, group.names))
            else:
                todo.append(group)
        for solved in self.solve(todo, notes, needs_data):
            self.keep(next(iter(solved)), solved)
            self.swap(solved)

    def keep(self, part: str, solved: dict[str, Solved]) -> None:
        """Make a part durable, where there is a state."""
        if solved:
            self.team.from_first(lambda: self.state.write(part, solved))

    def restored(self, part: str, names: Iterable[str]) -> dict[str, Solved]:
        """The layers of a part that is in the state."""
        layers = {name: self.model.get_submodule(name) for name in names}
        if not layers:
            return {}
        data = self.team.from_first(lambda: self.state.read(part))

        def read() -> dict[str, Solved]:
            for layer in layers.values():
                read_bias(layer)
            try:
                return decode(data, layers)
            except ValueError as error:
                raise ValueError(f"compress: part {part} of the state: {error}") from None

        solved = self.team.jointly(read)
        self._take(solved)
        return solved

    def swap(self, solved: dict[str, Solved]) -> None:
        """Put the packed layers in the place of the dense ones."""
        swap_all(self.model, {name: layer.packed for name, layer in solved.items()})

    @contextmanager
    def errors_count_layers(self) -> Iterator[None]:
        """Errors say how many layers are replaced already, and what a state has of them."""
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as error:
            if not self.report.rows:
                raise
            done = f"{len(self.report.rows)} of {len(self.chosen)} layers are changed already; the model still runs"
            advice = f"; {self.state.advice}" if self.state.advice else ""
            raise type(error)(f"{error} ({done}{advice})") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.state.advice) from None
