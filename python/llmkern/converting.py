"""convert: a checkpoint in another format, every weight the same value; refused where the format cannot hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkern import checkpoint, gguf_models, loading, streaming
from llmkern.checkpoints.folder import names_quantization
from llmkern.nn import PackedLinear, is_conv1d
from llmkern.patching import swap_all
from llmkern.pipeline import compress
from llmkern.recipe import Recipe
from llmkern.report import Report


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def open_source(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a folder (ours, another's, or dense) or of a GGUF file, its layers packed as they are stored.

    dtype: of what is not packed, by default the checkpoint's own. Raises as `llmkern.load` and `llmkern.stream` do.
    """
    folder = Path(path).expanduser()
    if (gguf := gguf_models.find(folder)) is not None:
        return gguf_models.load(gguf, dtype)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"convert: {folder}: no config.json there, so not a model folder")
    if not (folder / checkpoint.META).is_file() and not names_quantization(folder):
        return streaming.stream(folder, dtype=dtype or "auto")
    model = loading.load(folder)
    return model if dtype is None else model.to(dtype)


def refuse(model: nn.Module, format: str) -> None:
    """ValueError where writing the model in `format` would change a weight, with the layer and the reason."""
    layers = packed_layers(model)
    if format != "dense" and not layers:
        raise ValueError(
            f"convert: no layer of it is packed, and {format} holds codes or masks; --recipe says how to find them"
        )
    for name, layer in layers.items():
        if layer.input_order is not None and format != "dense":
            raise ValueError(
                f"convert: layer {name}: its columns are in the order of their activations (act-order), which {format} "
                "as it is written here does not hold; --format dense does, or --recipe makes new codes"
            )
        if format == "dense":
            _refuse_rounding(model, name, layer)


def _refuse_rounding(model: nn.Module, name: str, layer: PackedLinear) -> None:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    exact = layer.unpack(torch.float32)
    changed = int((exact.to(dtype).float() != exact).sum())
    if changed:
        raise ValueError(
            f"convert: layer {name}: {changed} of {exact.numel()} weights are no values of "
            f"{str(dtype).removeprefix('torch.')}; --dtype float32 holds them"
        )


def solve_again(model: nn.Module, recipe: Recipe) -> Report:
    """New codes, in place, by a recipe that needs no data, from the values of the old ones."""
    swap_all(model, {name: _dense(layer) for name, layer in packed_layers(model).items()})
    return compress(model, recipe, None, progress=True)


def _dense(layer: PackedLinear) -> nn.Module:
    if layer.conv1d:
        raise ValueError("convert: a packed Conv1D is not made dense again; convert from the dense model")
    weight = layer.unpack(torch.float32)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = layer.bias  # type: ignore[assignment]
    return dense.train(layer.training)


def compare(model: nn.Module, written: nn.Module) -> int:
    """How many layers of `written` have exactly the weights of `model`. ValueError for one that has not."""
    theirs = dict(written.named_modules())
    for name, layer in packed_layers(model).items():
        other = theirs.get(name)
        if isinstance(other, PackedLinear):
            found = other.unpack(torch.float32)
        else:
            weight = getattr(other, "weight", None)
            found = weight.detach().float() if isinstance(weight, torch.Tensor) else torch.empty(0)
            found = found.T if other is not None and is_conv1d(other) else found
        if not torch.equal(found, layer.unpack(torch.float32)):
            raise ValueError(f"convert: layer {name} was not written as it was")
    return len(packed_layers(model))
