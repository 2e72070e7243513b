"""compress: solve linear layers block by block, in a block stage by stage, on inputs of what is compressed so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import blocks, experts, listed_experts
from llmkern._dense import dense_by_onednn
from llmkern._progress import Progress
from llmkern.blocks import Call, Chain, SharedInputs
from llmkern.calibration import Calibration, calls_of, count_tokens, move, move_call, quiet, rows_that_count
from llmkern.experts import Experts
from llmkern.listed_experts import ListedExperts
from llmkern.nn import PackedLinear, dense_weight, is_conv1d, is_linear
from llmkern.patching import choose, notes_on, solve_and_keep, swap_all
from llmkern.recipe import Recipe
from llmkern.report import Report, Row, model_bytes
from llmkern.stages import split, stages

NOT_A_CHAIN = "its block does not run exactly once per forward: calibrated in one pass over the whole model"
OUTSIDE = "outside the repeated blocks: calibrated after them"
NO_NOTES: Mapping[str, str] = MappingProxyType({})
REMEDIES = 'give data that reaches it, calibrate experts from all tokens (experts="all"), or ignore it'
# Layers that are put in place in one walk over the model, which may hold ten thousands of experts' layers.
SWAPS = 64
UNMASKED = "its input is not laid out as the attention_mask: tokens of padding counted too"


def compress(
    model: nn.Module, recipe: str | Recipe, calibration: Calibration | None = None, *,
    device: torch.device | str | None = None, state_dir: str | Path | None = None, progress: bool = True,
) -> Report:  # fmt: skip
    """Compress the linear layers of `model` in place, as `recipe` says, and report on every one.

    calibration: token ids [n, L]; an iterable of batches (tensors, or mappings of the model's arguments); or a callable
    that runs the model it is given, whose calls are recorded. Tokens that an attention_mask hides do not count. None is
    fine for data-free recipes. device: where blocks run and are solved (default: where they are); the model stays where
    it is otherwise. progress: a bar on stderr.

    A mixture of experts with 3-D parameters becomes `llmkern.experts.Experts`: every expert's matrices are layers of
    their own, calibrated from the tokens that are routed to the expert, or from all with `Recipe(experts="all")`. A row
    of the report says when a layer saw fewer tokens than it has input features.

    Raises ValueError: no calibration tokens, a layer that saw none, activations that are not finite (the layer is
    named), a pattern that matches nothing, a model that is compressed already, or what a solver refuses. Layers
    replaced before the error stay replaced, the message counts them, and the model still runs.
    """
    recipe = Recipe.parse(recipe)
    if state_dir is not None:
        raise NotImplementedError("compress: state_dir (resume) is not implemented yet; leave it out")
    start, before = time.perf_counter(), model_bytes(model)
    report = Report(str(recipe), details=recipe.to_dict(), model_bytes_before=before)
    if recipe.method == "cast":
        _cast(model, recipe, report)
    else:
        with experts.unfused(model):
            chosen, report.skipped = choose(model, recipe, "compress")
            notes = notes_on(model, chosen)
            experts.settle(model, busy={model.get_submodule(name) for name in chosen})
            run = _Run(model, chosen, report, device, progress, recipe.experts == "all")
            with run.errors_count_layers(), quiet(model), torch.no_grad(), dense_by_onednn(model):
                if any(wanted.needs_calibration for wanted in chosen.values()):
                    run.calibrated(calls_of(model, calibration))
                else:
                    run.data_free()
                    if calibration is not None:
                        report.notes.append(f"{recipe} needs no data: the calibration was not used")
            if recipe.experts == "all" and not run.found_mixtures:
                report.notes.append('experts="all" changed nothing: no mixture of experts ran during calibration')
            report.annotate(notes)
            report.note_few_tokens()
    report.model_bytes_after = model_bytes(model)
    report.seconds = time.perf_counter() - start
    return report


class _Run:
    """One compression: the model, what each layer gets, and the report that grows."""

    def __init__(
        self, model: nn.Module, chosen: dict[str, Recipe], report: Report, device: Any, progress: bool,
        everything: bool,
    ) -> None:  # fmt: skip
        self.model, self.chosen, self.report, self.everything = model, chosen, report, everything
        self.device = None if device is None else torch.device(device)
        self.bar = Progress(report.recipe, len(chosen), progress)
        self.batches: list[Call] = []
        self.found_mixtures = False

    def data_free(self) -> None:
        names = list(self.chosen)
        for start in range(0, len(names), SWAPS):
            pending: dict[str, PackedLinear] = {}
            try:
                for name in names[start : start + SWAPS]:
                    pending |= self._solve({name: self.model.get_submodule(name)}, None)
            finally:
                swap_all(self.model, pending)

    def calibrated(self, batches: list[Call]) -> None:
        """Chain after chain, block after block; then whatever is in no chain, in one pass over the whole model."""
        self.batches = batches
        self.report.tokens = sum(map(count_tokens, batches))
        first = batches[0]
        if len(first.args) == 1 and not first.kwargs:
            first = Call((first.args[0][:1],), {})  # how a model is wired shows on one sequence
        chains, irregular = blocks.learn(self.model, self._bound(self.model, first))
        done: set[str] = set()
        for chain in chains:
            done |= self._chain(chain)
        rest = {name: self.model.get_submodule(name) for name in self.chosen if name not in done}
        if rest:
            shared = SharedInputs(rest, self._mixtures(self.model, self._bound(self.model, first)), self.everything)
            for batch in batches:
                shared.rows = rows_that_count(self.model, batch)
                self._collect(shared, self._bound(self.model, batch))
            inside = tuple(block + "." for block in irregular)
            notes = {name: NOT_A_CHAIN if name.startswith(inside) else OUTSIDE for name in rest}
            for layers in _groups(shared, rest):
                self._replace(layers, shared, notes)

    def _chain(self, chain: Chain) -> set[str]:
        """Compress one chain; the names of its layers."""
        count = len(chain.blocks)
        layers = [
            {name: layer for name, layer in blocks.linears(block, prefix).items() if name in self.chosen}
            for block, prefix in zip(chain.blocks, chain.names, strict=True)
        ]
        last = max((k for k in range(count) if layers[k]), default=-1)
        kinds = sorted({chain.kind[k] for k in range(last + 1) if k == 0 or chain.follows[k]})
        captured: list[dict[int, Call]] = []
        hidden: list[Tensor] = []
        calls: list[Call] = []
        for k in range(last + 1):
            if k == 0:
                captured = [self._capture(chain, batch, kinds) for batch in self.batches]
                calls = [found[0] for found in captured]
                captured = [chain.frame(found) for found in captured]
            elif chain.follows[k]:
                calls = [chain.call(k, found, h) for found, h in zip(captured, hidden, strict=True)]
            else:
                calls = [self._capture(chain, batch, [k])[k] for batch in self.batches]
            feeds_next = k < last and chain.follows[k + 1]
            hidden = self._block(chain.blocks[k], layers[k], calls, feeds_next)
        return {name for found in layers for name in found}

    def _block(
        self, block: nn.Module, layers: dict[str, nn.Module], calls: list[Call], feeds_next: bool
    ) -> list[Tensor]:
        """Compress one block on these calls; with `feeds_next`, the hidden states it hands on."""
        home = next((parameter.device for parameter in block.parameters()), torch.device("cpu"))
        device = self.device or home
        block.to(device)
        pending: dict[str, PackedLinear] = {}
        first = self._bound(block, move_call(calls[0], device))
        mixtures = self._mixtures(block, first) if layers else []
        for stage in self._stages(layers, first, mixtures):
            shared = SharedInputs(stage, mixtures, self.everything)
            for batch, call in zip(self.batches, calls, strict=True):
                shared.rows = rows_that_count(self.model, batch)
                self._collect(shared, self._bound(block, move_call(call, device)))
            for group in _groups(shared, stage):
                pending |= self._solve(group, shared)
                shared.forget(group)
        # The codes' dense values run in the place of the packed weight until the next block's inputs are known: the
        # numbers are the same, and at this many rows nothing beats the dense product. Quantized activations differ.
        swap_all(self.model, {name: packed for name, packed in pending.items() if packed.activations})
        hidden = []
        if feeds_next:
            for call in calls:
                args, kwargs = move_call(call, device)
                hidden.append(move(blocks.hidden_state(block(*args, **kwargs)), home))
        swap_all(self.model, {name: packed for name, packed in pending.items() if not packed.activations})
        experts.settle(block)
        block.to(home)
        return hidden

    def _stages(
        self, layers: dict[str, nn.Module], first: Callable[[], Any], mixtures: list[Experts | ListedExperts]
    ) -> list[dict[str, nn.Module]]:
        """The block's layers in the order of their inputs, each stage on inputs from the stages solved before it.

        A forward ends at its stage's last layer, so four stages (q/k/v, o, gate/up, down) cost about half a forward
        more than one.
        """
        if not layers:
            return []
        probe = SharedInputs(layers, mixtures, self.everything)
        self._collect(probe, first)
        routed = {name for name in layers if layers[name] in probe.routed}
        groups = list(probe.shared_by().values())
        features = {name: dense_weight(layer).shape[1] for name, layer in layers.items()}
        found = stages(list(layers), groups, routed)
        return [{name: layers[name] for name in part} for stage in found for part in split(stage, groups, features)]

    def _mixtures(self, module: nn.Module, first: Callable[[], Any]) -> list[Experts | ListedExperts]:
        """The mixtures of experts inside a module that `first` runs; lists of experts only where it matters."""
        listed = listed_experts.find(module, first) if self.everything else []
        found: list[Experts | ListedExperts] = [*experts.mixtures(module).values(), *listed]
        self.found_mixtures |= bool(found)
        return found

    def _solve(
        self, layers: dict[str, nn.Module], shared: SharedInputs | None, notes: Mapping[str, str] = NO_NOTES,
        run_on: bool = True,
    ) -> dict[str, PackedLinear]:  # fmt: skip
        """Solve the layers of one input; the packed layers are returned. With `run_on` the dense weights become the
        solutions, and run in their place.
        """
        pending = {}
        for name, layer in layers.items():
            hessian = None
            if shared is not None:
                hessian = shared.hessian(name)
                if hessian is None or not hessian.tokens:
                    raise ValueError(f"compress: layer {name} saw no calibration tokens; {REMEDIES}")
            packed, row, solution = solve_and_keep("compress", name, layer, hessian, self.chosen[name])
            pending[name] = packed
            self.report.rows.append(row)
            if shared is not None and row.tokens < packed.in_features:
                row.notes = (*row.notes, f"{row.tokens} calibration tokens for {packed.in_features} input features")
            if shared is not None and name in shared.unmasked:
                row.notes = (*row.notes, UNMASKED)
            if name in notes:
                row.notes = (*row.notes, notes[name])
            if shared is not None and run_on:
                layer.weight.copy_(solution.weight.T if is_conv1d(layer) else solution.weight)  # type: ignore[operator]
            self.bar.step(name)
        return pending

    def _replace(
        self, layers: dict[str, nn.Module], shared: SharedInputs | None, notes: Mapping[str, str] = NO_NOTES
    ) -> None:
        # Not the dense weight: nothing runs it, and that of a tied head is the embeddings' too.
        swap_all(self.model, self._solve(layers, shared, notes, run_on=False))

    def _collect(self, shared: SharedInputs, run: Callable[[], Any]) -> None:
        try:
            shared.forward(run)
        except ValueError as error:
            raise ValueError(f"compress: {error}") from None

    def _capture(self, chain: Chain, batch: Call, which: list[int]) -> dict[int, Call]:
        return blocks.capture(chain, self._bound(self.model, batch), which)

    @staticmethod
    def _bound(module: nn.Module, call: Call) -> Callable[[], Any]:
        return lambda: module(*call.args, **call.kwargs)

    @contextmanager
    def errors_count_layers(self) -> Iterator[None]:
        """Errors say how many layers are replaced already."""
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as error:
            if not self.report.rows:
                raise
            done = f"{len(self.report.rows)} of {len(self.chosen)} layers are changed already; the model still runs"
            raise type(error)(f"{error} ({done})") from error


def _groups(shared: SharedInputs, layers: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The layers of each input, those that never ran last."""
    groups = list(shared.shared_by().values())
    ran = {name for group in groups for name in group}
    for group in [*groups, [name for name in layers if name not in ran]]:
        if group:
            yield {name: layers[name] for name in group}


def _cast(model: nn.Module, recipe: Recipe, report: Report) -> None:
    """The whole model to another float dtype; a weight beyond its range is an error."""
    dtype = getattr(torch, str(recipe.dtype))
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("compress: the model holds packed layers already; a cast would not reach them")
    with experts.unfused(model):
        layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name, layer in layers.items():
        weight = dense_weight(layer)
        cast = weight.to(dtype)
        if not torch.isfinite(cast).all():
            raise ValueError(f"compress: layer {name}: a weight is not finite in {recipe.dtype}")
        error = (weight.float() - cast.float()).square().sum() / weight.float().square().sum().clamp(min=1e-30)
        n, k = weight.shape
        report.rows.append(Row(name, (n, k), str(recipe), "torch", float(error), 0.0, weight.nbytes, cast.nbytes))
    # What no file holds (rotary frequencies) stays as the model computes it, as when a checkpoint of that dtype loads.
    computed = [
        (module, key, module._buffers[key]) for module in model.modules() for key in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, key, buffer in computed:
        module._buffers[key] = buffer
