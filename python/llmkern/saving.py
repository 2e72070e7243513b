"""save: a model with packed layers as a folder; `llmkern.checkpoint` says what is in it."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import expert_tensors, experts, streaming
from llmkern._version import __version__
from llmkern.checkpoint_folder import EXTRA, FORMAT_VERSION, FORMATS, META, WEIGHTS, refuse_foreign, whole_folder
from llmkern.formats import compressed_tensors as ct
from llmkern.formats import gptq_checkpoint
from llmkern.nn import ORDER, PackedLinear, is_linear, packed_names
from llmkern.report import Report
from llmkern.weight_writer import Later, write

LARGE = 1 << 20  # bytes


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
    with whole_folder(path) as folder:
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
            "num_bits": layer.num_bits,
            "act_order": layer.act_order,
            **({} if layer.input_order is None else {ORDER: True}),
        }
    return tensors, extra, layers, schemes, unread


def _encode(layer: PackedLinear, format: str) -> ct.Stored:
    """A layer in the layout of a format. ValueError for what the format cannot hold."""
    if format == "gptq":
        if layer.input_order is not None:
            raise ValueError("gptq: columns in an order of their own are not written; use compressed-tensors")
        return gptq_checkpoint.encode(layer.packed, bits=layer.num_bits, act_order=layer.act_order)
    stored = ct.encode(layer.packed, activations=layer.activations, bits=layer.num_bits, act_order=layer.act_order)
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
    packed = packed_names(model)
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
