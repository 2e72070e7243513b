"""save and load: a model with packed layers as a folder that stock readers understand, and back bit for bit.

    config.json           the model's, with the quantization_config of the format (none if no layer has codes)
    model.safetensors     every tensor, packed layers in the format's layout
    llmkern.json          which layer is which packed class: what `load` needs and no standard file says
    llmkern.safetensors   masks that the standard layout does not tell (absent when there are none)
    generation_config.json, tokenizer files, report.json, report.html   where there are any

A folder is written beside its place under a temporary name, flushed, and renamed: it is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import expert_tensors, experts, streaming
from llmkern._files import flush
from llmkern._version import __version__
from llmkern.checkpoints import read_model
from llmkern.formats import PackedWeight, gptq_checkpoint
from llmkern.formats import compressed_tensors as ct
from llmkern.nn import ORDER, PackedLinear, dense_weight, is_conv1d, is_linear
from llmkern.patching import swap_all
from llmkern.report import Report
from llmkern.weight_files import parameters_on_meta
from llmkern.weight_writer import Later, write

FORMATS = ("compressed-tensors", "gptq", "dense")
FORMAT_VERSION = 1
META, WEIGHTS, EXTRA = "llmkern.json", "model.safetensors", "llmkern.safetensors"
LARGE = 1 << 20  # bytes
MARK = ".llmkern-"  # in the names of temporary siblings


def save(
    model: nn.Module, path: str | Path, format: str = "compressed-tensors", *,
    tokenizer: Any = None, report: Report | None = None,
) -> Path:  # fmt: skip
    """Write a transformers model to the folder `path`, which appears complete or not at all.

    format: "compressed-tensors"; "gptq" (v1, symmetric int4/int8 with float16 scales); "dense" (weights unpacked to the
    model's dtype). A folder at `path` is replaced if llmkern wrote it (it holds llmkern.json) or it is empty, refused
    otherwise. Raises FileExistsError for that, TypeError for a model without a transformers config, ValueError for
    what the format cannot hold.
    """
    if format not in FORMATS:
        raise ValueError(f"save: format must be one of {', '.join(FORMATS)}, got {format!r}")
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_file"):
        raise TypeError(f"save: {type(model).__name__} has no transformers config; only transformers models are saved")
    path = Path(path)
    refuse_foreign(path)
    tensors, extra, layers, schemes, unread = _encode_layers(model, format)
    rest, tied = _other_tensors(model)
    tensors |= rest
    by_expert = expert_tensors.fuse(tensors, experts.mixtures(model))
    if by_expert and not schemes:  # a scheme of no codes: without any, nothing would tell readers to keep off
        schemes = [(name, None, None) for name in layers]
    if by_expert and format == "gptq":
        raise ValueError(
            f"save: {by_expert[0]}: gptq: no reader knows experts of a 3-D parameter; use compressed-tensors"
        )
    for home in by_expert:
        inside = (name for name in layers if name.startswith(f"{home}."))
        unread |= dict.fromkeys(inside, "it is an expert, of which the model's own code knows only a 3-D parameter")
    config = _config(model)
    head = _untied_head(model)
    if head and not tied and not config.get("is_encoder_decoder"):
        config["tie_word_embeddings"] = False
    elif head:  # the key also says what else is tied, or scales what T5's head gets
        unread[head] = "its weight was tied to the embeddings, as config.json still says"
    standard = not by_expert and not any(layers[name]["conv1d"] or ORDER in layers[name] for name, _, _ in schemes)
    if (quantization := _quantization(model, format, schemes, standard)) is not None:
        config["quantization_config"] = quantization
    _warn_of(unread)
    meta = {
        "format_version": FORMAT_VERSION,
        "llmkern": __version__,
        "format": format,
        "model_class": type(model).__name__,
        "recipe": report.details if report else None,
        "tied": tied,
        "layers": layers,
    }
    with _whole_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write(folder / WEIGHTS, tensors, {"format": "pt"})
        if extra:
            write(folder / EXTRA, extra, {"format": "pt"})
        if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if report is not None:
            report.to_json(folder / "report.json")
            report.to_html(folder / "report.html")
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return path


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
    model = _skeleton(folder, meta["model_class"])
    tensors = _read_tensors(folder / WEIGHTS, device)
    extra = _read_tensors(folder / EXTRA, device) if (folder / EXTRA).exists() else {}
    decode = gptq_checkpoint.decode if meta["format"] == "gptq" else ct.decode
    # A mixture of which a layer was packed was saved as `Experts`: its layers have names of their own.
    homes = {parent for name in meta["layers"] for parent in accumulate(name.split("."), "{}.{}".format)}
    with experts.unfused(model, only=homes.__contains__):
        expert_tensors.split(tensors, experts.mixtures(model))
        swap_all(model, {
            name: _restore_layer(model, name, entry, tensors, extra, decode, meta["tied"])
            for name, entry in meta["layers"].items()
        })  # fmt: skip
    if extra:
        raise ValueError(f"load: {EXTRA} holds unknown tensors: {_some(extra)}")
    _restore_rest(model, tensors, meta["tied"])
    return model.to(device).eval()


def refuse_foreign(path: Path) -> None:
    """FileExistsError unless `path` is free, an empty folder, or a folder that llmkern wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"save: {path} exists and is not a folder")
    if any(path.iterdir()) and not (path / META).is_file():
        raise FileExistsError(f"save: {path} exists and was not written by llmkern (no {META}); choose another folder")


Schemes = list[tuple[str, dict[str, Any] | None, str | None]]


def _encode_layers(model: nn.Module, format: str) -> tuple[dict, dict, dict, Schemes, dict[str, str]]:
    """Tensors, extra tensors, the entries of llmkern.json, (layer, scheme, activations) of those with codes, and why
    other readers cannot read some.
    """
    tensors: dict[str, Tensor | Later] = {}
    extra: dict[str, Tensor | Later] = {}
    layers: dict[str, Any] = {}
    schemes: Schemes = []
    unread: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        packed = layer.packed
        if format == "dense":
            shape = torch.Size(packed.shape[::-1] if layer.conv1d else packed.shape)
            dtype = _model_dtype(model)
            tensors[f"{name}.weight"] = Later(dtype, shape, partial(_dense, layer, dtype))
            continue
        try:
            stored = _encode(layer, format)
        except ValueError as error:
            raise ValueError(f"save: layer {name}: {error}") from None
        if stored.scheme is not None:
            schemes.append((name, stored.scheme, layer.activations))
            if layer.conv1d:
                unread[name] = "it is a Conv1D"
            elif layer.input_order is not None:
                unread[name] = "its columns are in an order of their own"
            elif packed.shape[1] % packed.group_size:
                unread[name] = f"K={packed.shape[1]} is not a multiple of group_size {packed.group_size}"
        tensors |= {f"{name}.{key}": _or_later(t, layer, format, key) for key, t in stored.tensors.items()}
        extra |= {f"{name}.{key}": tensor for key, tensor in stored.extra.items()}
        if layer.input_order is not None:
            extra[f"{name}.{ORDER}"] = layer.input_order
        layers[name] = {
            "class": layer.format,
            "shape": list(packed.shape),
            "group_size": packed.group_size,
            "activations": layer.activations,
            "conv1d": layer.conv1d,
            "method": layer.method,
            **({} if layer.input_order is None else {ORDER: True}),
        }
    return tensors, extra, layers, schemes, unread


def _encode(layer: PackedLinear, format: str) -> ct.Stored:
    """A layer in the layout of a format. ValueError for what the format cannot hold."""
    if format == "gptq":
        if layer.input_order is not None:
            raise ValueError("gptq: columns in an order of their own are not written; use compressed-tensors")
        return gptq_checkpoint.encode(layer.packed)
    stored = ct.encode(layer.packed, activations=layer.activations)
    if stored.scheme is None and layer.input_order is not None:
        raise ValueError("columns in an order of their own are saved with codes only")
    if stored.scheme is None and layer.conv1d:
        return stored._replace(tensors={"weight": stored.tensors["weight"].T.contiguous()})
    return stored


def _dense(layer: PackedLinear, dtype: torch.dtype) -> Tensor:
    dense = layer.unpack(dtype)
    return dense.T.contiguous() if layer.conv1d else dense


def _or_later(tensor: Tensor, layer: PackedLinear, format: str, key: str) -> Tensor | Later:
    """The tensor; one that is large and no part of the layer is made again when it is written."""
    own = {part.untyped_storage().data_ptr() for part in layer.packed.tensors().values()}
    if tensor.nbytes < LARGE or tensor.untyped_storage().data_ptr() in own:
        return tensor
    return Later(tensor.dtype, tensor.shape, lambda: _encode(layer, format).tensors[key])


def _warn_of(unread: dict[str, str]) -> None:
    """Say which layers other readers cannot read."""
    if unread:
        name, reason = next(iter(unread.items()))
        warnings.warn(
            f"save: llmkern.load reads this folder, other readers cannot: {len(unread)} layers, as {name}: {reason}",
            stacklevel=3,
        )


def _quantization(model: nn.Module, format: str, schemes: Schemes, standard: bool) -> dict[str, Any] | None:
    """The quantization_config; None if every reader of dense models can read this one."""
    if not schemes and standard:
        return None
    if format == "gptq":
        return gptq_checkpoint.quantization_config([scheme for _, scheme, _ in schemes if scheme])
    coded = {name for name, _, _ in schemes}
    ignore = [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or isinstance(module, PackedLinear)) and name not in coded
    ]
    return ct.quantization_config(_group(schemes), ignore, standard=standard)


def _group(schemes: Schemes) -> list[tuple[dict[str, Any] | None, str | None, list[str]]]:
    groups: dict[str, tuple[dict[str, Any] | None, str | None, list[str]]] = {}
    for name, scheme, activations in schemes:
        key = json.dumps([scheme, activations])
        groups.setdefault(key, (scheme, activations, []))[2].append(name)
    return list(groups.values())


def _other_tensors(model: nn.Module) -> tuple[dict[str, Tensor | Later], dict[str, str]]:
    """Every tensor that is no packed weight, and which names are only other names of a parameter (name -> first)."""
    packed = _packed_names(model)
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            tied[name] = known
    rest: dict[str, Tensor | Later] = {}
    for name, tensor in model.state_dict().items():
        if name in packed or name in tied:
            continue
        owner, _, leaf = name.rpartition(".")
        read = partial(streaming.parameter, model.get_submodule(owner), leaf)
        rest[name] = Later(tensor.dtype, tensor.shape, read) if tensor.is_meta else tensor
    return rest, tied


def _packed_names(model: nn.Module) -> set[str]:
    """The names of all tensors of packed weights."""
    return {
        f"{name}.{buffer}"
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, PackedLinear)
        for buffer in layer._buffers
    }


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's config.json."""
    config = json.loads(model.config.to_json_string(use_diff=True))  # type: ignore[union-attr, operator]
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(_model_dtype(model)).removeprefix("torch.")
    config.pop("quantization_config", None)
    return config


def _untied_head(model: nn.Module) -> str | None:
    """The packed output head of a model whose configuration says that it shares the weight of the embeddings."""
    tied = getattr(model.config, "tie_word_embeddings", False)  # no key in the file where it is the class's default
    head = model.get_output_embeddings() if tied else None  # type: ignore[operator]
    return next((name for name, m in model.named_modules() if m is head and isinstance(m, PackedLinear)), None)


def _model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first float parameter: that of the embeddings."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; becomes `path` at the end, or disappears if something goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}{MARK}{os.getpid()}-", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for file in folder.iterdir():
            flush(file)
        flush(folder)
        if path.exists():
            old = folder.with_name(folder.name + "-old")
            path.rename(old)
            folder.rename(path)
            shutil.rmtree(old)
        else:
            folder.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs left beside `path`; what a living process writes stays."""
    for left in path.parent.glob(f".{path.name}{MARK}*"):
        pid = left.name.rsplit(MARK, 1)[1].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / META).is_file():
        raise FileNotFoundError(f"load: {folder} holds no {META} and no config.json: not a folder of a model")
    meta = _read_json(folder / META)
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"load: {META} has format_version {version!r}; this llmkern {__version__} reads {FORMAT_VERSION}"
        )
    if meta.get("format") not in FORMATS:
        raise ValueError(f"load: {META} has format {meta.get('format')!r}; known: {', '.join(FORMATS)}")
    for key, kind in (("model_class", str), ("layers", dict), ("tied", dict)):
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"load: {META} needs {key} as a {kind.__name__}, got {meta.get(key)!r}")
    return meta


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {path.name} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"load: {path.name} must hold an object, got {type(data).__name__}")
    return data


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load: {path.name} cannot be read: {str(error).splitlines()[0]}") from None


def _skeleton(folder: Path, class_name: str) -> Any:
    """The model without weights: its parameters on the meta device, its other buffers computed as the model does."""
    try:
        import transformers
    except ImportError:
        raise ImportError("load: transformers is not installed; pip install 'llmkern[hf]'") from None

    kind = getattr(transformers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"load: {META} names the model class {class_name!r}, which transformers does not have")
    _read_json(folder / "config.json")
    config = kind.config_class.from_pretrained(folder)  # type: ignore[union-attr]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with parameters_on_meta():
        model = kind._from_config(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _restore_layer(
    model: nn.Module, name: str, entry: Any, tensors: dict[str, Tensor], extra: dict[str, Tensor],
    decode: Callable[..., PackedWeight], tied: dict[str, str],
) -> PackedLinear:  # fmt: skip
    """The packed layer `name`; its tensors are taken out of `tensors` and `extra`."""
    kind, shape, group_size, activations = _entry(name, entry)
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"load: {META} names the layer {name}, which the model does not have") from None
    if not is_linear(dense):
        raise ValueError(f"load: layer {name} is a {type(dense).__name__}, wanted a linear layer")
    wanted = tuple(dense_weight(dense).shape)
    if shape != wanted:
        raise ValueError(f"load: layer {name} is {list(shape)} in {META}, but {list(wanted)} in the model")
    own = _take(tensors, name)
    bias = own.pop("bias", None)
    if f"{name}.bias" in tied:
        bias = dense.get_parameter("bias")  # without values: they are another parameter's
    if "weight" in own and "weight_scale" not in own and is_conv1d(dense):
        own["weight"] = own["weight"].T.contiguous()
    if (bias is None) != (dense.bias is None):
        raise ValueError(
            f"load: layer {name} has {'no bias in the file' if bias is None else 'a bias only in the file'}"
        )
    beside = _take(extra, name)
    order = beside.pop(ORDER, None)
    if (order is not None) != bool(entry.get(ORDER)):
        raise ValueError(f"load: {EXTRA} {'lacks' if order is None else 'holds an unknown'} tensor {name}.{ORDER}")
    try:
        packed = decode(kind, own, beside, shape=shape, group_size=group_size)
        parameter = None if bias is None else nn.Parameter(bias)
        return PackedLinear(
            packed, parameter, activations=activations, conv1d=is_conv1d(dense), method=str(entry.get("method", "")),
            input_order=order,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ValueError(f"load: layer {name}: {error}") from None


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, int], int, str | None]:
    """One layer's entry of llmkern.json; ValueError unless it has the types it must have."""
    fields = entry if isinstance(entry, dict) else {}
    shape, group_size, activations = fields.get("shape"), fields.get("group_size"), fields.get("activations")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and size > 0 for size in shape)
        or type(group_size) is not int
        or activations not in (None, "int8")
    ):
        raise ValueError(f"load: {META} has a bad entry for layer {name}: {json.dumps(entry)[:200]}")
    return str(fields.get("class")), (shape[0], shape[1]), group_size, activations


def _take(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one layer by suffix, removed from `tensors`."""
    found = [key for key in tensors if key.rpartition(".")[0] == name]
    return {key.rpartition(".")[2]: tensors.pop(key) for key in found}


def _restore_rest(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
    """Everything that is no packed layer; ValueError for a tensor too many or too few, or of another shape."""
    packed = _packed_names(model)
    packed |= {name.rpartition(".")[0] + ".bias" for name in packed}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in packed and name not in tied}
    if missing := wanted.keys() - tensors.keys():
        raise ValueError(f"load: {WEIGHTS} lacks {len(missing)} tensors: {_some(missing)}")
    if unknown := tensors.keys() - wanted.keys():
        raise ValueError(f"load: {WEIGHTS} holds {len(unknown)} unknown tensors: {_some(unknown)}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"load: {name} must be {list(tensor.shape)}, got {list(tensors[name].shape)}")
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, source in tied.items():
        owner, _, key = name.rpartition(".")
        try:
            model.get_submodule(owner)._parameters[key] = model.get_parameter(source)
        except AttributeError:
            raise ValueError(f"load: {META} ties {name} to {source}, which the model does not have") from None
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(f"load: no values for {_some(empty)}")


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
