"""patch and unpatch: swap a model's linear layers without data, and put them back; `Layers` for whoever swaps."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmkern._registry import OPS
from llmkern.nn import PackedLinear, dense_weight, is_linear
from llmkern.recipe import DATA_FREE, DEFAULT_IGNORE, Recipe
from llmkern.report import Report, Row, Skipped, model_bytes
from llmkern.solve import solve
from llmkern.solvers import Solution

# The originals of a patched model, on the model itself: they follow it through deepcopy, and nothing global holds it.
ORIGINALS = "_llmkern_originals"


def patch(
    model: nn.Module, scheme: str | Recipe, targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = DEFAULT_IGNORE, *, keep_originals: bool = True,
) -> Report:  # fmt: skip
    """Replace the linear layers (nn.Linear, Conv1D) of `model` by packed ones, in place and without calibration.

    scheme: a Recipe or short form of a data-free method: "rtn-...", "w8a8", "magnitude-...", or "pack", "pack-2:4" for
    weights that are sparse already. targets, ignore: as in Recipe; a Recipe's own are used when it has any.
    keep_originals: keep the dense modules so that `unpatch` can restore them; False frees them.

    Fused expert weights (3-D parameters) and output heads tied to the embeddings are left as they are and reported.
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
    chosen, skipped = choose(model, recipe, "patch")
    report = Report(str(recipe), skipped=skipped, details=recipe.to_dict(), model_bytes_before=before)
    packed: dict[str, PackedLinear] = {}
    for name, wanted in chosen.items():
        layer = model.get_submodule(name)
        packed[name], row = solve_layer("patch", name, layer, None, wanted)
        report.rows.append(row)
    originals = {name: swap(model, name, layer) for name, layer in packed.items()}
    if keep_originals:
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
    for name, original in originals.items():
        swap(model, name, original)
    object.__delattr__(model, ORIGINALS)


def choose(model: nn.Module, recipe: Recipe, caller: str) -> tuple[dict[str, Recipe], list[Skipped]]:
    """The layers to replace with their recipes, and those that stay with the reasons.

    ValueError when the model holds packed layers already, or when nothing is left to replace.
    """
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
    chosen, skipped = recipe.assign(layers, _head(model, layers))
    tied = _tied(model, layers)
    for name in tied & chosen.keys():
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
    caller: str, name: str, layer: nn.Module, hessian: Any, recipe: Recipe
) -> tuple[PackedLinear, Row, Solution]:
    """As `solve_layer`, with the solution, whose dense weight a caller may still want to run."""
    start, weight = time.perf_counter(), dense_weight(layer)
    if weight.data_ptr() % 64:
        # A view of a mapped file may start anywhere, and sums over it round otherwise than over memory of our own.
        weight = weight.clone()
    try:
        solution = solve(weight, hessian, recipe)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{caller}: layer {name} ({recipe!s}): {error}") from error
    if solution.packed is None:
        raise ValueError(f"{caller}: layer {name}: no packed format holds the result of {recipe}")
    packed = PackedLinear.from_linear(layer, solution.packed, activations=recipe.activations, method=str(recipe))
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
        notes=tuple(solution.notes),
    )
    return packed, row, solution


def kernel_of(layer: PackedLinear, dtype: torch.dtype) -> str:
    """The kernel that runs one token of `dtype` through the layer on its device."""
    packed = layer.packed
    x = torch.empty(1, layer.in_features, dtype=dtype, device=packed.device)
    extra = (layer.activations,) if layer.op == "int4_linear" else ()
    return OPS[layer.op].pick(x, *packed.op_args(layer.bias), *extra).name


def swap(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place `name`, wherever else the same module sits too; return what was there."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return old


def _why_not(module: nn.Module) -> str:
    """Why a module that multiplies by a matrix is no layer to replace; empty if it holds no such matrix."""
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of nn.Linear with a forward of its own"
    if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)) and not _is_conv(module):
        return "fused expert weights (3-D) are not supported yet"
    return ""


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _matrix_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False) if parameter.ndim in (2, 3))


def _head(model: nn.Module, layers: dict[str, nn.Module]) -> str | None:
    """The name of the output head, whatever the model calls it."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, layer in layers.items() if layer is head), None)


def _tied(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """Layers whose weight another module holds as well."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {name for name, layer in layers.items() if len(owners[id(layer.weight)]) > 1}
