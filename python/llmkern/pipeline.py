"""compress: solve linear layers block by block, in a block stage by stage, on inputs of what is compressed so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from llmkern import blocks
from llmkern._dense import dense_by_onednn
from llmkern._progress import Progress
from llmkern.activations import Calls, Store
from llmkern.blocks import Call, Chain, SharedInputs
from llmkern.calibration import Calibration, calls_of, count_tokens, move, move_call, quiet, rows_that_count
from llmkern.nn import PackedLinear, dense_weight, is_conv1d, is_linear
from llmkern.patching import choose, solve_and_keep, swap
from llmkern.recipe import Recipe
from llmkern.report import Report, Row, model_bytes
from llmkern.streaming import held, is_streamed

# Distinct inputs of a block up to which they are taken one after the other.
MAX_STAGES = 8
NOT_A_CHAIN = "its block does not run exactly once per forward: calibrated in one pass over the whole model"
OUTSIDE = "outside the repeated blocks: calibrated after them"


def compress(
    model: nn.Module, recipe: str | Recipe, calibration: Calibration | None = None, *,
    device: torch.device | str | None = None, state_dir: str | Path | None = None, progress: bool = True,
    activation_budget: int | None = None,
) -> Report:  # fmt: skip
    """Compress the linear layers of `model` in place, as `recipe` says, and report on every one.

    calibration: token ids [n, L]; an iterable of batches (tensors, or mappings of the model's arguments); or a callable
    that runs the model it is given, whose calls are recorded. Tokens that an attention_mask hides do not count. None is
    fine for data-free recipes. device: where blocks run and are solved (default: where they are); the model stays where
    it is otherwise. progress: a bar on stderr. activation_budget: bytes of hidden states that stay in memory between
    blocks, those beyond it go to a temporary file; None is a quarter of the memory that is available.

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
        if is_streamed(model):
            raise ValueError(f"compress: {recipe} changes the whole model, so it cannot be streamed; load it whole")
        _cast(model, recipe, report)
    else:
        chosen, report.skipped = choose(model, recipe, "compress")
        run = _Run(model, chosen, report, device, progress, activation_budget)
        with run.errors_count_layers(), quiet(model), torch.no_grad(), dense_by_onednn(model):
            if any(wanted.needs_calibration for wanted in chosen.values()):
                run.calibrated(calls_of(model, calibration))
            else:
                run.data_free()
                if calibration is not None:
                    report.notes.append(f"{recipe} needs no data: the calibration was not used")
    report.model_bytes_after = model_bytes(model)
    report.seconds = time.perf_counter() - start
    return report


class _Run:
    """One compression: the model, what each layer gets, and the report that grows."""

    def __init__(
        self, model: nn.Module, chosen: dict[str, Recipe], report: Report, device: Any, progress: bool,
        activation_budget: int | None,
    ) -> None:  # fmt: skip
        self.model, self.chosen, self.report = model, chosen, report
        self.activation_budget = activation_budget
        self.device = None if device is None else torch.device(device)
        self.bar = Progress(report.recipe, len(chosen), progress)
        self.batches: list[Call] = []

    def data_free(self) -> None:
        for name in self.chosen:
            self._replace({name: self.model.get_submodule(name)}, None)

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
            shared = SharedInputs(rest)
            for batch in batches:
                shared.rows = rows_that_count(self.model, batch)
                self._collect(shared, self._bound(self.model, batch))
            inside = tuple(block + "." for block in irregular)
            notes = {name: NOT_A_CHAIN if name.startswith(inside) else OUTSIDE for name in rest}
            for layers in _groups(shared, rest):
                self._replace(layers, shared, notes)
                shared.drop(layers)

    def _chain(self, chain: Chain) -> set[str]:
        """Compress one chain; the names of its layers."""
        count = len(chain.blocks)
        names = [
            [name for name in blocks.linears(block, prefix) if name in self.chosen]
            for block, prefix in zip(chain.blocks, chain.names, strict=True)
        ]
        last = max((k for k in range(count) if names[k]), default=-1)
        kinds = sorted({chain.kind[k] for k in range(last + 1) if k == 0 or chain.follows[k]})
        frames: list[dict[int, Call]] = []
        with Store(self.activation_budget) as hidden:
            for k in range(last + 1):
                if k == 0 or not chain.follows[k]:
                    entered = self._enter(chain, [k] if k else kinds, hidden)
                    frames = frames or entered
                    own = [frame[k] for frame in entered]
                else:
                    own = [frame[chain.kind[k]] for frame in frames]
                feeds_next = k < last and chain.follows[k + 1]
                # Looked up now, and not kept: the dense layers go when they are replaced.
                layers = {name: self.model.get_submodule(name) for name in names[k]}
                with held(chain.blocks[k]):
                    self._block(chain.blocks[k], layers, Calls(chain, own, hidden), feeds_next)
        return {name for found in names for name in found}

    def _enter(self, chain: Chain, which: list[int], hidden: Store) -> list[dict[int, Call]]:
        """Run the model up to these blocks: their calls per batch without hidden states; the first's is stored."""
        frames = []
        for at, batch in enumerate(self.batches):
            found = {}
            for k, call in blocks.capture(chain, self._bound(self.model, batch), which).items():
                found[k], state = chain.split(call)
                if k == which[0]:
                    hidden.put(at, state)
            frames.append(found)
        return frames

    def _block(self, block: nn.Module, layers: dict[str, nn.Module], calls: Calls, feeds_next: bool) -> None:
        """Compress one block on these calls; with `feeds_next`, what it hands on takes the place of its inputs."""
        home = next((parameter.device for parameter in block.parameters()), torch.device("cpu"))
        device = self.device or home
        block.to(device)
        pending: dict[str, PackedLinear] = {}
        for stage in self._stages(block, layers, move_call(calls[0], device)):
            shared = SharedInputs(stage)
            for batch, call in zip(self.batches, calls, strict=True):
                shared.rows = rows_that_count(self.model, batch)
                self._collect(shared, self._bound(block, move_call(call, device)))
            for group in _groups(shared, stage):
                pending |= self._solve(group, shared)
                shared.drop(group)
        # The codes' dense values run in the place of the packed weight until the next block's inputs are known: the
        # numbers are the same, and at this many rows nothing beats the dense product. Quantized activations differ.
        for name, packed in pending.items():
            if packed.activations:
                swap(self.model, name, packed)
        if feeds_next:
            for at, call in enumerate(calls):
                args, kwargs = move_call(call, device)
                calls.hidden.put(at, move(blocks.hidden_state(block(*args, **kwargs)), home))
        for name, packed in pending.items():
            if not packed.activations:
                swap(self.model, name, packed)
        block.to(home)

    def _stages(self, block: nn.Module, layers: dict[str, nn.Module], first: Call) -> list[dict[str, nn.Module]]:
        """The block's layers in the order of their inputs, each stage on inputs from the stages solved before it.

        A forward ends at its stage's last layer, so four stages (q/k/v, o, gate/up, down) cost about half a forward
        more than one. A block of many inputs (experts), or of layers that the first batch leaves out, is one stage.
        """
        if not layers:
            return []
        probe = SharedInputs(layers)
        self._collect(probe, self._bound(block, first))
        stages = [{name: layers[name] for name in group} for group in probe.shared_by().values()]
        complete = sum(map(len, stages)) == len(layers)
        return stages if complete and len(stages) <= MAX_STAGES else [layers]

    def _solve(
        self, layers: dict[str, nn.Module], shared: SharedInputs | None, notes: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, PackedLinear]:
        """Solve the layers of one input. Their dense weights become the solutions; the packed layers are returned."""
        pending = {}
        for name, layer in layers.items():
            hessian = None
            if shared is not None:
                hessian = shared.hessian(name)
                if hessian is None or not hessian.tokens:
                    raise ValueError(
                        f"compress: layer {name} saw no calibration tokens; give data that reaches it or ignore it"
                    )
            with held(layer):
                packed, row, solution = solve_and_keep("compress", name, layer, hessian, self.chosen[name])
                if shared is not None:
                    layer.weight.copy_(solution.weight.T if is_conv1d(layer) else solution.weight)  # type: ignore[operator]
            if name in notes:
                row.notes = (*row.notes, notes[name])
            pending[name] = packed
            self.report.rows.append(row)
            self.bar.step(name)
        return pending

    def _replace(
        self, layers: dict[str, nn.Module], shared: SharedInputs | None, notes: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        for name, packed in self._solve(layers, shared, notes).items():
            swap(self.model, name, packed)

    def _collect(self, shared: SharedInputs, run: Callable[[], Any]) -> None:
        try:
            shared.forward(run)
        except ValueError as error:
            raise ValueError(f"compress: {error}") from None

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
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("compress: the model holds packed layers already; a cast would not reach them")
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
