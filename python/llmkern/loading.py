"""load: a model from a folder that `save` or others wrote, its layers packed; nothing in a file is believed."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import expert_files, expert_tensors, experts
from llmkern._json import read_object
from llmkern._version import __version__
from llmkern.checkpoint_folder import CHANGED, EXTRA, FORMAT_VERSION, FORMATS, META, check_unchanged, seal
from llmkern.checkpoints import read_model
from llmkern.formats import compressed_tensors as ct
from llmkern.formats import gptq_checkpoint
from llmkern.formats.bit_words import BITS
from llmkern.nn import ORDER, PackedLinear, dense_weight, is_conv1d, is_linear, packed_names
from llmkern.patching import swap_all
from llmkern.skeleton import build
from llmkern.weight_files import DTYPES, FLOATS, headers, weight_paths

# What a layer has in the files, and beside them.
LEAVES = (
    "weight", "bias", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "qweight", "qzeros",
    "scales", "g_idx", "positions", "bits", ORDER,
)  # fmt: skip


def load(path: str | Path, device: torch.device | str | None = "cpu") -> Any:
    """The model of a folder that `save` wrote, in eval mode, its layers packed as they were, bit for bit; of one that
    others wrote (compressed-tensors, GPTQ, AWQ) by `llmkern.checkpoints`, packed too.

    Packed weights go straight from the file into their layers; nothing is unpickled and no code of the folder runs.
    Raises FileNotFoundError without a folder of either kind, ValueError for anything missing, unknown, of another
    shape, or out of range.
    """
    folder = Path(path)
    device = torch.device("cpu" if device is None else device)
    if not (folder / META).is_file() and (folder / "config.json").is_file():
        return read_model(folder, device)
    meta = _read_meta(folder)
    paths, beside = weight_paths(folder, "load"), [folder / EXTRA] if (folder / EXTRA).is_file() else []
    check_unchanged(folder, meta, [*paths, *beside])
    tensors, extra = _read_tensors(paths, device), _read_tensors(beside, device)
    model = build(folder, _model_class(meta["model_class"]), paths, len(tensors))
    _rename(tensors, meta.get("renamed", {}))
    # A mixture of which a layer was packed was saved as `Experts`: its layers have names of their own.
    homes = {parent for name in meta["layers"] for parent in accumulate(name.split("."), "{}.{}".format)}
    with experts.unfused(model, only=homes.__contains__):
        expert_tensors.split(tensors, experts.mixtures(model))
        swap_all(model, {
            name: _restore_layer(model, name, entry, tensors, extra, meta["format"], meta["tied"])
            for name, entry in meta["layers"].items()
        })  # fmt: skip
    if extra:
        raise ValueError(f"load: {EXTRA} holds unknown tensors: {_some(extra)}")
    _restore_rest(model, tensors, meta["tied"])
    return model.to(device).eval()


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / META).is_file():
        raise FileNotFoundError(f"load: {folder} holds no {META} and no config.json: not a folder of a model")
    meta = read_object(folder / META, "load")
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"load: {META} has format_version {version!r:.100}; this llmkern {__version__} reads {FORMAT_VERSION}"
        )
    if meta.get("format") not in FORMATS:
        raise ValueError(f"load: {META} has format {meta.get('format')!r:.100}; known: {', '.join(FORMATS)}")
    if meta.get("seal") != seal(meta):
        raise ValueError(f"load: {META} {CHANGED}")
    for key, kind in (("model_class", str), ("layers", dict), ("tied", dict), ("sha256", dict), ("headers", dict)):
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"load: {META} needs {key} as a {kind.__name__}, got {meta.get(key)!r:.100}")
    return meta


def _read_tensors(paths: list[Path], device: torch.device) -> dict[str, Tensor]:
    """Every tensor of these safetensors files. ValueError for a broken file, a dtype of no use, or a name twice."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in paths:
        for name, stored in headers(path, "load"):
            if stored.dtype not in DTYPES:
                raise ValueError(f"load: {path.name}: tensor {name} is of {stored.dtype}; known: {', '.join(DTYPES)}")
            if name in tensors:
                raise ValueError(f"load: {path.name}: tensor {name} is in another file as well")
        try:
            tensors |= load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"load: {path.name} cannot be read: {str(error).splitlines()[0]}") from None
    return tensors


def _model_class(name: str) -> Any:
    """A class of transformers; ValueError for what is no model of it."""
    try:
        import transformers
    except ImportError:
        raise ImportError("load: transformers is not installed; pip install 'llmkern[hf]'") from None

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"load: {META} names the model class {name!r:.100}, which transformers does not have")
    return kind


def _restore_layer(
    model: nn.Module, name: str, entry: Any, tensors: dict[str, Tensor], extra: dict[str, Tensor],
    format: str, tied: dict[str, str],
) -> PackedLinear:  # fmt: skip
    """The packed layer `name`; its tensors are taken out of `tensors` and `extra`."""
    kind, shape, group_size, activations, record = _entry(name, entry)
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"load: {META} names the layer {name}, which the model does not have") from None
    if not is_linear(dense):
        raise ValueError(f"load: layer {name} is a {type(dense).__name__}, wanted a linear layer")
    wanted = tuple(dense_weight(dense).shape)
    if shape != wanted:
        raise ValueError(f"load: layer {name} is {list(shape)} in {META}, but {list(wanted)} in the model")
    if "parts" in entry:
        own = expert_files.join(name, [_take(tensors, part) for part in _names(name, entry["parts"])], format)
    else:
        own = _take(tensors, name)
    bias = own.pop("bias", None)
    if f"{name}.bias" in tied:
        bias = dense.get_parameter("bias")  # without values: they are another parameter's
    if "weight" in own and "weight_scale" not in own and is_conv1d(dense):
        own["weight"] = own["weight"].T.contiguous()
    if bias is not None and bias.dtype not in FLOATS.values():
        raise ValueError(f"load: layer {name}: the bias must be a float tensor, got {bias.dtype}")
    if (bias is None) != (dense.bias is None):
        raise ValueError(
            f"load: layer {name} has {'no bias in the file' if bias is None else 'a bias only in the file'}"
        )
    decode = gptq_checkpoint.decode if format == "gptq" else ct.decode
    beside = _take(extra, name)
    order = beside.pop(ORDER, None)
    if (order is not None) != bool(entry.get(ORDER)):
        raise ValueError(f"load: {EXTRA} {'lacks' if order is None else 'holds an unknown'} tensor {name}.{ORDER}")
    try:
        packed = decode(kind, own, beside, shape=shape, group_size=group_size, bits=record["num_bits"])
        parameter = None if bias is None else nn.Parameter(bias)
        return PackedLinear(
            packed, parameter, activations=activations, conv1d=is_conv1d(dense), input_order=order, **record
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"load: layer {name}: {error}") from None


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, int], int, str | None, dict[str, Any]]:
    """One layer's entry of llmkern.json, and its record; ValueError unless it has the types it must have."""
    fields = entry if isinstance(entry, dict) else {}
    shape, group_size, activations = fields.get("shape"), fields.get("group_size"), fields.get("activations")
    record = {
        "method": fields.get("method", ""),
        "num_bits": fields.get("num_bits"),
        "act_order": fields.get("act_order"),
    }
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and size > 0 for size in shape)
        or type(group_size) is not int
        or activations not in (None, "int8")
        or not isinstance(record["method"], str)
        or not (record["num_bits"] is None or (type(record["num_bits"]) is int and record["num_bits"] in BITS))
        or record["act_order"] not in (None, "static")
    ):
        raise ValueError(f"load: {META} has a bad entry for layer {name}: {json.dumps(entry)[:200]}")
    return str(fields.get("class")), (shape[0], shape[1]), group_size, activations, record


def _names(name: str, parts: Any) -> list[str]:
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"load: {META} has a bad entry for layer {name}: parts must be names, got {parts!r:.200}")
    return parts


def _rename(tensors: dict[str, Any], renamed: Any) -> None:
    """Give tensors the names that they have in the model. ValueError for names that are none."""
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise ValueError(f"load: {META} needs renamed as a dict of names, got {renamed!r:.200}")
    for name, own in renamed.items():
        if name not in tensors or own in tensors:
            raise ValueError(f"load: {META} renames {name} to {own}, of which one is missing or there already")
        tensors[own] = tensors.pop(name)


def _take(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one layer by suffix, removed from `tensors`; what no layer has stays."""
    return {leaf: tensors.pop(f"{name}.{leaf}") for leaf in LEAVES if f"{name}.{leaf}" in tensors}


def _restore_rest(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
    """Everything that is no packed layer; ValueError for a tensor too many or too few, or of another shape."""
    packed = packed_names(model)
    packed |= {name.rpartition(".")[0] + ".bias" for name in packed}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in packed and name not in tied}
    if missing := wanted.keys() - tensors.keys():
        raise ValueError(f"load: the files lack {len(missing)} tensors: {_some(missing)}")
    if unknown := tensors.keys() - wanted.keys():
        raise ValueError(f"load: the files hold {len(unknown)} unknown tensors: {_some(unknown)}")
    for name, tensor in wanted.items():
        found = tensors[name]
        if found.shape != tensor.shape:
            raise ValueError(f"load: {name} must be {list(tensor.shape)}, got {list(found.shape)}")
        if found.dtype not in (FLOATS.values() if tensor.is_floating_point() else (tensor.dtype,)):
            raise ValueError(f"load: {name} must be of a dtype such as {tensor.dtype}, got {found.dtype}")
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, source in tied.items():
        _tie(model, name, source)
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(f"load: no values for {_some(empty)}")


def _tie(model: nn.Module, name: str, source: Any) -> None:
    """Let the parameter `name` be the parameter `source`; ValueError unless the model has both, of one shape."""
    owner, _, key = name.rpartition(".")
    try:
        home, shared = model.get_submodule(owner), model.get_parameter(source)
        own = home._parameters[key]
    except (AttributeError, KeyError):
        raise ValueError(f"load: {META} ties {name} to {source!r:.100}, which the model does not have") from None
    if own is None or own.shape != shared.shape:
        raise ValueError(f"load: {META} ties {name} to {source}, of another shape")
    home._parameters[key] = shared


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
