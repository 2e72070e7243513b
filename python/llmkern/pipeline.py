"""compress: solve linear layers block by block, in a block stage by stage, on inputs of what is compressed so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkern import blocks, experts, listed_experts
from llmkern._dense import dense_by_onednn
from llmkern._pages import give_back
from llmkern.activations import Calls, Store
from llmkern.blocks import Call, Chain, linears
from llmkern.calibration import Calibration, calls_of, count_tokens, device_of, move, move_call, quiet, rows_that_count
from llmkern.casting import cast
from llmkern.dense_twin import DenseTwin
from llmkern.distributed import Group
from llmkern.experts import Experts
from llmkern.fisher import Sensitivity, Unknown, gather
from llmkern.layer_solver import NO_SENSITIVITY, LayerSolver
from llmkern.listed_experts import ListedExperts
from llmkern.nn import dense_weight
from llmkern.patching import choose, notes_on
from llmkern.recipe import Recipe
from llmkern.report import Report, model_bytes
from llmkern.shared_inputs import DenseRun, SharedInputs
from llmkern.stages import parts, split, stages
from llmkern.streaming import held, is_streamed

NOT_A_CHAIN = "its block does not run exactly once per forward: calibrated in one pass over the whole model"
# Dense bytes of the layers that one part of a state holds where there is no data: fewer are not worth the flushing.
PART_BYTES = 256 << 20
SHARED = "it stands in several blocks: calibrated on the inputs of all of them, after the blocks"
OUTSIDE = "outside the repeated blocks: calibrated after them"


def compress(
    model: nn.Module, recipe: str | Recipe, calibration: Calibration | None = None, *,
    device: torch.device | str | None = None, state_dir: str | Path | None = None, strict: bool = False,
    progress: bool = True, activation_budget: int | None = None,
) -> Report:  # fmt: skip
    """Compress the linear layers of `model` in place, as `recipe` says, and report on every one.

    calibration: token ids [n, L]; an iterable of batches (tensors, or mappings of the model's arguments); or a callable
    that runs the model it is given, whose calls are recorded. Tokens that an attention_mask hides do not count. None is
    fine for data-free recipes. device: where blocks run and are solved (default: where they are); the model stays where
    it is otherwise. progress: a bar on stderr. activation_budget: bytes of hidden states that stay in memory between
    blocks, those beyond it go to a temporary file; None is a quarter of the memory that is available.

    What an error is measured by is in the recipe: its effect on the model's outputs, from one backward pass over the
    calibration (`llmkern.fisher`), or `objective="layer"`. A model without gradients is solved by the latter, and the
    report says so. `loss` in the report is on the Hessian whose tokens are weighted so, and against the weight that
    makes up for errors of the input (`Recipe.input_correction`), which keeps a second hidden state per sequence and the
    dense weights of one block beside the model.

    state_dir: a folder in which every finished block becomes durable. The same call on the dense model, after the
    process was killed, goes on from there, and the result is the same bit for bit; the folder of another model, recipe,
    calibration or version is refused (see `llmkern.state.State` for all it raises). It stays when the run is over:
    delete it once the model is saved. strict: what the report calls a problem of a layer is an error before the layer
    is replaced.

    In an initialized process group of several ranks, all of them call this with the same arguments, share the work
    (`llmkern.distributed`), and end up with the same model; state_dir is read and written by rank 0 alone. A streamed
    model (`llmkern.stream`) each of them opens for itself.
    A mixture of experts with 3-D parameters becomes `llmkern.experts.Experts`: every expert's matrices are layers of
    their own, calibrated from the tokens that are routed to the expert, or from all with `Recipe(experts="all")`. A row
    of the report says when a layer saw fewer tokens than it has input features.

    Raises ValueError: no calibration tokens, a layer that saw none, activations that are not finite (the layer is
    named), a pattern that matches nothing, a model that is compressed already, or what a solver refuses. Layers
    replaced before the error stay replaced, the message counts them, and the model still runs. RuntimeError: another
    rank is gone.
    """
    recipe = Recipe.parse(recipe)
    start, before = time.perf_counter(), model_bytes(model)
    report = Report(str(recipe), details=recipe.to_dict(), model_bytes_before=before)
    if recipe.method == "cast":
        if is_streamed(model):
            raise ValueError(f"compress: {recipe} changes the whole model, so it cannot be streamed; load it whole")
        cast(model, recipe, report)
        if state_dir is not None:
            report.notes.append(f"{recipe} is done at once: state_dir was not used")
    else:
        with experts.unfused(model):
            chosen, report.skipped = choose(model, recipe, "compress")
            notes = notes_on(model, chosen)
            experts.settle(model, busy={model.get_submodule(name) for name in chosen})
            run = _Run(model, chosen, report, device, strict, progress, activation_budget, recipe.experts == "all")
            needs_data = any(wanted.needs_calibration for wanted in chosen.values())
            with run.solver.errors_count_layers(), quiet(model), torch.no_grad(), dense_by_onednn(model, rough=True):
                batches = calls_of(model, calibration) if needs_data else []
                with closing(run.solver.open(recipe, batches, state_dir, run.device)):
                    if needs_data:
                        run.calibrated(batches)
                    else:
                        run.data_free()
                if calibration is not None and not needs_data:
                    report.notes.append(f"{recipe} needs no data: the calibration was not used")
            if recipe.experts == "all" and not run.found_mixtures:
                report.notes.append('experts="all" changed nothing: no mixture of experts ran during calibration')
            report.annotate(notes)
            report.note_few_tokens()
    give_back()
    report.model_bytes_after = model_bytes(model)
    report.seconds = time.perf_counter() - start
    return report


class _Run:
    """One compression: the model, what each layer gets, and the report that grows."""

    def __init__(
        self, model: nn.Module, chosen: dict[str, Recipe], report: Report, device: Any, strict: bool, progress: bool,
        activation_budget: int | None, everything: bool,
    ) -> None:  # fmt: skip
        self.model, self.chosen, self.report, self.strict = model, chosen, report, strict
        self.everything, self.activation_budget = everything, activation_budget
        self.device = None if device is None else torch.device(device)
        self.solver = LayerSolver(model, chosen, report, strict=strict, progress=progress)
        self.team = self.solver.team
        self.batches: list[Call] = []  # this rank's
        self.shared: set[str] = set()  # layers that are one module in several blocks
        self.found_mixtures = False

    def data_free(self) -> None:
        """Part after part, as many at a time as there are ranks."""
        sizes = {name: dense_weight(self.model.get_submodule(name)).nbytes for name in self.chosen}
        inside: dict[str, str] = {}
        for name, block in blocks.named(self.model):
            inside |= dict.fromkeys(linears(block, name), name)
        todo = parts(sizes, inside, PART_BYTES)
        for at in range(0, len(todo), self.team.size):
            self.solver.replace_all(self.team.data_free(todo[at : at + self.team.size]), needs_data=False)

    def calibrated(self, batches: list[Call]) -> None:
        """Chain after chain, block after block; then whatever is in no chain, in one pass over the whole model."""
        self.batches = self.team.share(batches)
        self.report.tokens = sum(map(count_tokens, batches))
        first = batches[0]
        if len(first.args) == 1 and not first.kwargs:
            first = Call((first.args[0][:1],), {})  # how a model is wired shows on one sequence
        self.solver.sensitivity = self._sensitivity()
        chains, irregular = self.team.jointly(partial(blocks.learn, self.model, self._bound(self.model, first)))
        done: set[str] = set()
        for chain in chains:
            done |= self._chain(chain)
        rest = {name: self.model.get_submodule(name) for name in self.chosen if name not in done}
        if rest:
            mixtures = self._mixtures(self.model, self._bound(self.model, first))
            groups = self._groups(rest, mixtures, ((self.model, batch) for batch in self.batches))
            inside = tuple(block + "." for block in irregular)
            notes = {name: NOT_A_CHAIN if name.startswith(inside) else OUTSIDE for name in rest}
            notes |= dict.fromkeys(self.shared & rest.keys(), SHARED)
            self.solver.replace_all(groups, notes)

    def _sensitivity(self) -> Sensitivity | None:
        """What the model's output feels of the layers that are measured by it; None where none is, or nothing is known.

        It is the dense model's, and no part of a state: a resumed run gathers it again, to the same bits.
        """
        wanted = {name: self.model.get_submodule(name) for name, recipe in self.chosen.items() if recipe.by_model}
        if not wanted:
            return None
        found = Sensitivity(wanted)
        numbered = {self.team.rank + at * self.team.size: batch for at, batch in enumerate(self.batches)}

        def work() -> str:
            try:
                gather(self.model, wanted, numbered, found)
            except Unknown as reason:
                return str(reason)
            return ""

        if reason := next(filter(None, self.team.each(work)), ""):
            if self.strict:
                raise ValueError(f"compress: {NO_SENSITIVITY}: {reason} (strict)")
            self.report.notes.append(f"{NO_SENSITIVITY}: {reason}")
            return None
        self.team.add_up(found)
        return found

    def _chain(self, chain: Chain) -> set[str]:
        """Compress one chain; the names of its layers."""
        count = len(chain.blocks)
        found_in = [linears(block, prefix) for block, prefix in zip(chain.blocks, chain.names, strict=True)]
        times = Counter(id(layer) for found in found_in for layer in found.values())
        self.shared |= {name for found in found_in for name, layer in found.items() if times[id(layer)] > 1}
        names = [[name for name in found if name in self.chosen and name not in self.shared] for found in found_in]
        del found_in  # dense layers go when they are replaced
        last = max((k for k in range(count) if names[k]), default=-1)
        kinds = sorted({chain.kind[k] for k in range(last + 1) if k == 0 or chain.follows[k]})
        durable = next((k for k in range(last + 1) if names[k] and chain.names[k] not in self.solver.done), last + 1)
        if durable > last:
            for k in range(last + 1):
                self._skip(chain, k, names[k])
            return {name for found in names for name in found}
        # What the finished blocks hand on is computed again from here: before it no block's output is another's input.
        first = max(k for k in range(durable + 1) if not chain.follows[k])
        corrects = any(self.chosen[name].correction for found in names for name in found)
        stores = 2 if corrects else 1
        with Store(self.activation_budget, stores) as hidden, Store(self.activation_budget, stores) as beside:
            twin = DenseTwin(beside) if corrects else None
            frames = self._enter(chain, kinds, hidden, twin)
            for k in range(last + 1):
                if k < first:
                    self._skip(chain, k, names[k])
                    continue
                if chain.follows[k] or not k:
                    own = [frame[chain.kind[k]] for frame in frames]
                else:
                    own = [frame[k] for frame in self._enter(chain, [k], hidden, twin)]
                feeds_next = k < last and chain.follows[k + 1]
                layers = {name: self.model.get_submodule(name) for name in names[k]}
                with self._held(chain.blocks[k]), ExitStack() as beside_it:
                    if twin is not None:
                        calls, device = Calls(chain, own, twin.hidden), self.device or device_of(chain.blocks[k])
                        beside_it.enter_context(twin.inside(chain.names[k], chain.blocks[k], layers, calls, device))
                    self._block(chain.names[k], chain.blocks[k], layers, Calls(chain, own, hidden), feeds_next, twin)
        return {name for found in names for name in found}

    def _enter(self, chain: Chain, which: list[int], hidden: Store, twin: DenseTwin | None) -> list[dict[int, Call]]:
        """Run the model up to these blocks: their calls per batch without hidden states; the first's is stored.

        The dense model's is taken to be the same: what was compressed before is not run dense again.
        """

        def run() -> list[dict[int, Call]]:
            frames = []
            for at, batch in enumerate(self.batches):
                found = {}
                for k, call in blocks.capture(chain, self._bound(self.model, batch), which).items():
                    found[k], state = chain.split(call)
                    if k == which[0]:
                        hidden.put(at, state)
                        if twin is not None:
                            twin.hidden.put(at, state)
                frames.append(found)
            return frames

        return self.team.jointly(run)

    @contextmanager
    def _held(self, block: nn.Module) -> Iterator[None]:
        """Inside, the block is in memory, on every rank."""
        with ExitStack() as stack:
            self.team.jointly(lambda: stack.enter_context(held(block)))
            yield

    def _skip(self, chain: Chain, k: int, names: list[str]) -> None:
        """Put the packed layers of a finished block in place, whose outputs nobody needs."""
        self.solver.swap(self.solver.restored(chain.names[k], names))
        self.team.jointly(lambda: experts.settle(chain.blocks[k]))  # which may read what stays dense

    def _block(
        self, part: str, block: nn.Module, layers: dict[str, nn.Module], calls: Calls, feeds_next: bool,
        twin: DenseTwin | None,
    ) -> None:  # fmt: skip
        """Compress one block on these calls; with `feeds_next`, what it hands on takes the place of its inputs."""
        home = device_of(block)
        device = self.device or home
        block.to(device)
        if part in self.solver.done:
            solved = self.solver.run_dense(self.solver.restored(part, layers))
        else:
            solved = {}

            def first() -> Any:
                args, kwargs = move_call(calls[0], device)
                return block(*args, **kwargs)

            mixtures = self._mixtures(block, first) if layers else []
            in_turn = self._stages(layers, first, mixtures)
            for number, stage in enumerate(in_turn, 1):
                runs = ((block, move_call(call, device)) for call in calls)
                advancing = feeds_next and number == len(in_turn)
                groups = self._groups(stage, mixtures, runs, twin, advancing=advancing)
                for found in self.solver.solve(groups, runs_on=True):
                    solved |= self.solver.run_dense(found)
            self.solver.keep(part, solved)
        if feeds_next and twin is not None:
            self.team.jointly(twin.advance)
        # The codes' dense values run in the place of the packed weight until the next block's inputs are known: the
        # numbers are the same, and at this many rows nothing beats the dense product. Quantized activations differ.
        self.solver.swap({name: layer for name, layer in solved.items() if layer.packed.activations})

        def hand_on() -> None:
            for at, call in enumerate(calls):
                args, kwargs = move_call(call, device)
                calls.hidden.put(at, move(blocks.hidden_state(block(*args, **kwargs)), home))

        if feeds_next:
            self.team.jointly(hand_on)
        self.solver.swap({name: layer for name, layer in solved.items() if not layer.packed.activations})
        experts.settle(block)
        block.to(home)

    def _stages(
        self, layers: dict[str, nn.Module], first: Callable[[], Any], mixtures: list[Experts | ListedExperts]
    ) -> list[dict[str, nn.Module]]:
        """The block's layers in the order of their inputs, each stage on inputs from the stages solved before it.

        A forward ends at its stage's last layer, so four stages (q/k/v, o, gate/up, down) cost about half a forward
        more than one.
        """
        if not layers:
            return []

        def probe() -> list[list[str]]:
            shared = SharedInputs(layers, mixtures, self.everything)
            self._collect(shared, first)
            return list(shared.shared_by().values())

        groups = self.team.from_first(probe)
        routed = SharedInputs(layers, mixtures).routed
        features = {name: dense_weight(layer).shape[1] for name, layer in layers.items()}
        found = stages(list(layers), groups, {name for name, layer in layers.items() if layer in routed})
        return [{name: layers[name] for name in part} for stage in found for part in split(stage, groups, features)]

    def _mixtures(self, module: nn.Module, first: Callable[[], Any]) -> list[Experts | ListedExperts]:
        """The mixtures of experts inside a module that `first` runs; lists of experts only where it matters."""
        found: list[Experts | ListedExperts] = [*experts.mixtures(module).values()]
        if self.everything:
            names = {part: name for name, part in module.named_modules()}

            def look() -> list[tuple[str, list[str]]]:
                return [(names[f.around], [names[e] for e in f.experts]) for f in listed_experts.find(module, first)]

            for around, members in self.team.from_first(look):
                found.append(ListedExperts(module.get_submodule(around), map(module.get_submodule, members)))
        self.found_mixtures |= bool(found)
        return found

    def _groups(
        self,
        layers: dict[str, nn.Module],
        mixtures: list[Experts | ListedExperts],
        runs: Iterable[tuple[nn.Module, Call]],
        twin: DenseTwin | None = None,
        *,
        advancing: bool = False,
    ) -> list[Group]:
        """The layers by their input, with its Hessian over all ranks' batches; `runs`: a call of a module per batch.

        advancing: no other stage of the block comes after these layers, and `twin` goes on to the next.
        """
        shifts = twin is not None and any(self.chosen[name].correction for name in layers)
        shared = SharedInputs(layers, mixtures, self.everything, shifts)

        def collect() -> list[str]:
            beside = twin.runs(advancing=advancing) if twin is not None and shifts else repeat(None, len(self.batches))
            for at, (batch, (module, call), dense) in enumerate(zip(self.batches, runs, beside, strict=True)):
                shared.rows = rows_that_count(self.model, batch)
                shared.weights = self.solver.sensitivity.weights(at) if self.solver.sensitivity else {}
                self._collect(shared, self._bound(module, call), dense)
            return sorted(shared.unmasked)

        self.solver.unmasked.update(*self.team.each(collect))
        return self.team.groups(shared)

    def _collect(self, shared: SharedInputs, run: Callable[[], Any], dense: DenseRun | None = None) -> None:
        try:
            shared.forward(run, dense)
        except ValueError as error:
            raise ValueError(f"compress: {error}") from None

    @staticmethod
    def _bound(module: nn.Module, call: Call) -> Callable[[], Any]:
        return lambda: module(*call.args, **call.kwargs)
