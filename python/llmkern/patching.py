"""patch and unpatch: swap a model's linear layers without data, and put them back; `Layers` for whoever swaps."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmkern import experts
from llmkern._registry import OPS
from llmkern.nn import PackedLinear, dense_weight, is_linear
from llmkern.recipe import DATA_FREE, DEFAULT_IGNORE, Recipe
from llmkern.report import Report, Row, Skipped, model_bytes
from llmkern.solve import solve
from llmkern.solvers import InputShift, Problem, Solution
from llmkern.solvers.output import OutputHessian

# Parameters of two or three dimensions that nothing is multiplied with: biases of experts, positions, decay rates.
NO_MATRIX = "bias|embed|pos|table|A_log"
# The originals of a patched model, on the model itself: they follow it through deepcopy, and nothing global holds it.
ORIGINALS = "_llmkern_originals"


def patch(
    model: nn.Module, scheme: str | Recipe, targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = DEFAULT_IGNORE, *, keep_originals: bool = True,
) -> Report:  # fmt: skip
    """Replace the linear layers of `model` (nn.Linear, Conv1D, experts) by packed ones, in place, without calibration.

    scheme: a Recipe or short form of a data-free method: "rtn-...", "w8a8", "magnitude-...", or "pack", "pack-2:4" for
    weights that are sparse already. targets, ignore: as in Recipe; a Recipe's own are used when it has any.
    keep_originals: keep the dense modules so that `unpatch` can restore them; False frees them.

    A mixture of experts with 3-D parameters becomes `llmkern.experts.Experts`; an expert's matrices are layers named
    like `model.layers.0.mlp.experts.3.gate_up_proj`, for patterns too. What stays is in the report, with the reason.
    Raises ValueError when the model is patched already, when nothing is left to replace, or for a layer that the
    scheme does not fit; the model is then unchanged.
    """
    recipe = Recipe.parse(scheme)
    if targets is not None:
        recipe = replace(recipe, targets=(targets,) if isinstance(targets, str) else tuple(targets))
    if ignore != DEFAULT_IGNORE:
        recipe = replace(recipe, ignore=ignore)  # type: ignore[arg-type]
    if recipe.needs_calibration:
        raise ValueError(f"patch: {recipe} needs calibration; use llmkern.compress (data-free: {', '.join(DATA_FREE)})")
    if recipe.method == "cast":
        raise ValueError(f"patch: {recipe} packs nothing; use model.to(torch.{recipe.dtype})")
    start, before = time.perf_counter(), model_bytes(model)
    with experts.unfused(model):
        fused = {name: mixture.fused for name, mixture in experts.mixtures(model).items() if mixture.fused}
        chosen, skipped = choose(model, recipe, "patch")
        report = Report(str(recipe), skipped=skipped, details=recipe.to_dict(), model_bytes_before=before)
        notes = notes_on(model, chosen)
        packed: dict[str, PackedLinear] = {}
        for name, wanted in chosen.items():
            layer = model.get_submodule(name)
            packed[name], row = solve_layer("patch", name, layer, None, wanted)
            report.rows.append(row)
        report.annotate(notes)
        originals = swap_all(model, packed)
    if keep_originals:
        # An expert's dense layers are views of the fused module, which goes back as a whole.
        inside = tuple(f"{name}." for name in fused)
        originals = {name: layer for name, layer in originals.items() if not name.startswith(inside)}
        originals |= {name: module for name, module in fused.items() if any(n.startswith(f"{name}.") for n in packed)}
        # Past nn.Module.__setattr__: registered, the originals would be part of the state dict.
        object.__setattr__(model, ORIGINALS, originals)
    report.model_bytes_after = model_bytes(model)
    report.seconds = time.perf_counter() - start
    return report


def unpatch(model: nn.Module) -> None:
    """Put back exactly the modules that `patch` replaced. ValueError if there are none."""
    originals = getattr(model, ORIGINALS, None)
    if originals is None:
        raise ValueError("unpatch: this model was not patched, or with keep_originals=False")
    swap_all(model, originals)
    object.__delattr__(model, ORIGINALS)


def choose(model: nn.Module, recipe: Recipe, caller: str) -> tuple[dict[str, Recipe], list[Skipped]]:
    """The layers to replace with their recipes, and those that stay with the reasons.

    ValueError when the model holds packed layers already, or when nothing is left to replace.
    """
    if is_linear(model):
        raise ValueError(f"{caller}: the model is itself a linear layer; put it into a module, as nn.Sequential")
    layers: dict[str, nn.Module] = {}
    others: list[Skipped] = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            raise ValueError(f"{caller}: {name} is packed already; start from the dense model, or call unpatch first")
        if is_linear(module):
            layers[name] = module
        elif reason := _why_not(module):
            others.append(Skipped(name, reason, _matrix_bytes(module)))
    if not layers:
        raise ValueError(f"{caller}: the model ({type(model).__name__}) has no linear layers")
    head = _head(model, layers)
    chosen, skipped = recipe.assign(layers, head, aliases(model))
    # The head was asked for by name (it is ignored otherwise): it gets a weight of its own.
    for name in tied(model, layers).keys() & chosen.keys() - {head}:
        del chosen[name]
        skipped[name] = "its weight is tied to another module's (usually the embeddings)"
    for name, wanted in chosen.items():
        k = dense_weight(layers[name]).shape[1]
        if wanted.group_size is not None and wanted.group_size > k:
            # Checked for all layers at once: the solver would refuse too, but after the layers before were changed.
            raise ValueError(
                f"{caller}: layer {name} ({wanted}): group_size must be in [1, K={k}], got {wanted.group_size}"
            )
    if not chosen:
        reasons = "; ".join(sorted({f"{reason}" for reason in skipped.values()}))
        raise ValueError(f"{caller}: no linear layer is left to replace: {reasons}")
    stay = [Skipped(name, reason, dense_weight(layers[name]).nbytes) for name, reason in skipped.items()]
    return chosen, stay + others


def solve_layer(caller: str, name: str, layer: nn.Module, hessian: Any, recipe: Recipe) -> tuple[PackedLinear, Row]:
    """Solve one layer. ValueError names the layer; the layer itself is not touched."""
    packed, row, _ = solve_and_keep(caller, name, layer, hessian, recipe)
    return packed, row


def solve_and_keep(
    caller: str, name: str, layer: nn.Module, hessian: Any, recipe: Recipe, output: OutputHessian | None = None,
    shift: InputShift | None = None,
) -> tuple[PackedLinear, Row, Solution]:  # fmt: skip
    """As `solve_layer`, with the solution, whose dense weight a caller may still want to run."""
    start, weight = time.perf_counter(), dense_weight(layer)
    if weight.data_ptr() % 64:
        # A view of a mapped file may start anywhere, and sums over it round otherwise than over memory of our own.
        weight = weight.clone()
    try:
        solution = solve(weight, hessian, recipe, None if output is None else output.to(weight.device), shift)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{caller}: layer {name} ({recipe!s}): {error}") from error
    notes, problems = facts_and_problems(solution)
    if solution.packed is None:
        raise ValueError(f"{caller}: layer {name}: no packed format holds the result of {recipe}")
    packed = PackedLinear.from_linear(
        layer, solution.packed, activations=recipe.activations, method=str(recipe), num_bits=recipe.bits,
        act_order="static" if recipe.orders_columns else None,
    )  # fmt: skip
    row = Row(
        name=name,
        shape=(packed.out_features, packed.in_features),
        method=str(recipe),
        kernel=kernel_of(packed, weight.dtype),
        loss=solution.loss,
        seconds=time.perf_counter() - start,
        bytes_before=weight.nbytes,
        bytes_after=packed.nbytes,
        damp=solution.damp if recipe.needs_calibration else None,
        tokens=getattr(hessian, "tokens", 0),
        notes=notes,
        problems=problems,
    )
    return packed, row, solution


def facts_and_problems(solution: Solution) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A solution's notes as plain text: those that say how it is, and those that say what is wrong."""
    problems = [str(note) for note in solution.notes if isinstance(note, Problem)]
    if not math.isfinite(solution.loss):
        problems.append(
            f"the relative output error is {solution.loss}: the outputs it is relative to are 0 or not finite"
        )
    return tuple(note for note in solution.notes if not isinstance(note, Problem)), tuple(problems)


def kernel_of(layer: PackedLinear, dtype: torch.dtype) -> str:
    """The kernel that runs one token of `dtype` through the layer on its device."""
    packed = layer.packed
    x = torch.empty(1, layer.in_features, dtype=dtype, device=packed.device)
    extra = (layer.activations,) if layer.op == "int4_linear" else ()
    return OPS[layer.op].pick(x, *packed.op_args(layer.bias), *extra).name


def swap(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place `name`, wherever else the same module sits too; return what was there."""
    return swap_all(model, {name: new})[name]


def swap_all(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """As `swap`, for many places in one walk over the model; name -> what was there."""
    old = {name: model.get_submodule(name) for name in new}
    experts.replace(model, {old[name]: module for name, module in new.items()})
    return old


def notes_on(model: nn.Module, chosen: Iterable[str]) -> dict[str, list[str]]:
    """What a report must say of layers that also have another name, or share their weight (the head)."""
    notes: dict[str, list[str]] = {name: [] for name in chosen}
    layers = {name: model.get_submodule(name) for name in notes}
    for name, others in aliases(model).items():
        if name in layers:
            notes[name].append(f"the same module is also {', '.join(others)}, replaced with it")
    for name, owners in tied(model, layers).items():
        notes[name].append(f"its weight was tied to that of {', '.join(owners)}, which stays as it is")
    return notes


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Linear layer -> the other names by which it is reached."""
    first: dict[nn.Module, str] = {}
    others: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module) and first.setdefault(module, name) != name:
            others.setdefault(first[module], []).append(name)
    return others


def _why_not(module: nn.Module) -> str:
    """Why a module that multiplies by a matrix is no layer to replace; empty if it holds no such matrix."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind} is a subclass of nn.Linear with a forward of its own"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd) or not matrices(module):
        return ""
    if any(matrix.ndim == 3 for matrix in matrices(module)):
        built = experts.build(module)
        return built if isinstance(built, str) else "experts that are the model itself; put them into a module"
    return f"{kind} multiplies with its weight in a forward of its own (as routers do)"


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that look like matrices to multiply with, or stacks of them."""
    own = module.named_parameters(recurse=False)
    return [p for name, p in own if p.ndim in (2, 3) and min(p.shape) > 1 and not re.search(NO_MATRIX, name)]


def _matrix_bytes(module: nn.Module) -> int:
    return sum(matrix.nbytes for matrix in matrices(module))


def _head(model: nn.Module, layers: dict[str, nn.Module]) -> str | None:
    """The name of the output head, whatever the model calls it."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, layer in layers.items() if layer is head), None)


def tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Layers whose weight other modules hold as well -> the names of those."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found = {name: [owner for owner in owners[id(layer.weight)] if owner != name] for name, layer in layers.items()}
    return {name: others for name, others in found.items() if others}
