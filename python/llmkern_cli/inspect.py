"""`llmkern inspect`: what is in a checkpoint, from its headers and JSON files; no tensor is read, no model is built."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmkern_cli._common import Number, megabytes, table
from llmkern_cli._headers import BITS, Stored, read_file, read_folder, read_json

NAME = "inspect"
HELP = "What is in a checkpoint: formats, bits, groups, sparsity, sizes, and the kernel of each layer here."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a model folder, a safetensors file or a GGUF file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The config's words, one entry per layer, and sums."""
    path = args.path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".gguf" or (path.is_dir() and not any(path.glob("*.safetensors"))):
        from llmkern.gguf_models import find  # torch is imported for what needs it alone

        if (gguf := find(path)) is not None:
            return {"path": str(args.path), **_of_gguf(gguf)}
    config, ours = {}, {}
    if path.is_dir():
        tensors = read_folder(path)
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        ours = read_json(path / "llmkern.json") if (path / "llmkern.json").is_file() else {}
    else:
        tensors = read_file(path)
    others, notes = _of_others(path) if config and not ours and _quantization(path, config) else ({}, [])
    layers = _layers(tensors, ours, others, _quantization(path, config))
    return {
        "path": str(args.path),
        "model_type": config.get("model_type"),
        "quant_method": _quantization(path, config).get("quant_method"),
        "recipe": _recipe(ours.get("recipe")),
        "layers": layers,
        **_sums(layers, sum(stored.nbytes for stored in tensors.values())),
        "notes": notes,
    }


def _sums(layers: list[dict[str, Any]], total: int) -> dict[str, int]:
    inside = sum(layer["bytes"] for layer in layers)
    return {"layer_bytes": inside, "other_bytes": total - inside, "bytes": total}


def _row(name: str, format: str, shape: Any, size: int, **known: Any) -> dict[str, Any]:
    """A layer; `op` is None where no op of ours would run it as it is stored."""
    fields = ("bits", "group_size", "symmetric", "act_order", "sparsity", "activations", "op")
    row: dict[str, Any] = {"name": name, "format": format, "shape": list(shape)}
    row |= {key: known.get(key) for key in fields}
    return {**row, "bytes": size, "kernel": _kernel(row["op"]) if row["op"] else None}


def _of_gguf(path: Path) -> dict[str, Any]:
    """The matrices of a GGUF file: they are dequantized when they are loaded, so no op runs them as they are."""
    from llmkern.gguf_header import read

    header = read(path)
    layers = [
        _row(name.removesuffix(".weight"), tensor.type, tensor.shape, tensor.nbytes, bits=tensor.bits)
        for name, tensor in header.tensors.items()
        if len(tensor.shape) > 1
    ]
    return {
        "model_type": header.architecture,
        "quant_method": "gguf",
        "recipe": None,
        "layers": sorted(layers, key=lambda layer: _natural(layer["name"])),
        **_sums(layers, sum(tensor.nbytes for tensor in header.tensors.values())),
        "notes": ["a GGUF file is input: its weights are dequantized when it is loaded"],
    }


def _of_others(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The layers with codes of a folder that others wrote, as the readers have them, and what should be known."""
    from llmkern import checkpoints

    try:
        found = checkpoints.describe(folder)
    except ValueError as error:
        return {}, [f"llmkern.load does not read it: {error}"]
    rows = {}
    for layer in found.layers:
        if layer.packed is None:
            continue
        rows[layer.name] = _row(
            layer.name, layer.format, layer.shape, layer.nbytes, bits=layer.bits, group_size=layer.group_size,
            symmetric=layer.symmetric, act_order=layer.act_order, sparsity=SPARSITY.get(layer.packed),
            activations=layer.activations, op=_op(layer.packed, layer.activations),
        )  # fmt: skip
    return rows, list(found.notes)


# The tensor that tells how a layer is stored; the first that is there.
_STORED = {"weight_packed": "compressed-tensors", "qweight": "gptq", "weight": "dense"}
# What transformers calls the stacked weights of experts.
_EXPERTS = (".gate_up_proj", ".up_proj", ".down_proj")
SPARSITY = {"Sparse24Weight": "2:4", "Sparse24Int4Weight": "2:4", "BitmaskWeight": "unstructured"}
_OPS = {
    "Int8Weight": "int8_linear",
    "Int4Weight": "int4_linear",
    "Sparse24Weight": "sparse24_linear",
    "Sparse24Int4Weight": "sparse24_int4_linear",
    "BitmaskWeight": "bitmask_linear",
}


def _op(kind: str, activations: str | None) -> str:
    """The op of a packed class."""
    return "int8_dynamic_linear" if kind == "Int8Weight" and activations else _OPS[kind]


def _layers(
    tensors: Mapping[str, Stored],
    ours: dict[str, Any],
    others: Mapping[str, dict[str, Any]],
    quantization: dict[str, Any],
) -> list[dict[str, Any]]:
    """One entry per matrix, or per stack of a mixture's experts; block 2 before block 10."""
    known = ours.get("layers")
    known = known if isinstance(known, dict) else {}
    renamed = _names_in_model(ours)
    parts: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        for part, own in _of_experts(renamed.get(name, name), stored, known):
            layer, _, leaf = part.rpartition(".")
            leaves = parts.setdefault(renamed.get(layer, layer), {})
            # The rows of one layer may be in several tensors.
            before = leaves[leaf].nbytes if leaf in leaves else 0
            leaves[leaf] = own._replace(nbytes=before + own.nbytes)
    found = []
    for layer in sorted(parts, key=_natural):
        if layer in others:
            found.append(others[layer])
            continue
        marks = [mark for mark in _STORED if mark in parts[layer]]
        ranks = (2, 3) if layer.endswith(_EXPERTS) else (2,)
        if not marks or len(parts[layer][marks[0]].shape) not in ranks:
            continue
        entry, leaves = known.get(layer), parts[layer]
        size = sum(stored.nbytes for part, stored in leaves.items() if part != "bias")
        if isinstance(entry, dict):
            found.append(_row(layer, size=size, **_ours(entry, leaves)))
        else:
            found.append(_row(layer, size=size, **_unread(marks[0], leaves[marks[0]], quantization)))
    if missing := sorted(set(known) - {layer["name"] for layer in found}):
        raise ValueError(f"llmkern.json names the layer {missing[0]}, which has no weight in the safetensors files")
    return found


def _names_in_model(ours: dict[str, Any]) -> dict[str, str]:
    """Tensors, and parts of layers, whose name in the files is not that in the model -> that."""
    renamed, layers = ours.get("renamed"), ours.get("layers")
    found = dict(renamed) if isinstance(renamed, dict) else {}
    for layer, entry in layers.items() if isinstance(layers, dict) else ():
        parts = entry.get("parts") if isinstance(entry, dict) else None
        found |= {str(part): layer for part in parts} if isinstance(parts, list) else {}
    return {name: own for name, own in found.items() if isinstance(own, str)}


def _of_experts(name: str, stored: Stored, known: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    """A tensor by its name; of a stack of experts: a weight for each that llmkern.json knows, else one for all."""
    if len(stored.shape) != 3 or not name.endswith(_EXPERTS):
        yield name, stored
        return
    home, _, projection = name.rpartition(".")
    names = [f"{home}.{at}.{projection}" for at in range(stored.shape[0])]
    if known.keys().isdisjoint(names):
        yield f"{name}.weight", stored
        return
    for expert in names:
        yield f"{expert}.weight", Stored(stored.dtype, stored.shape[1:], stored.nbytes // len(names))


def _ours(entry: dict[str, Any], leaves: dict[str, Stored]) -> dict[str, Any]:
    """A layer that llmkern.json describes."""
    kind, shape, activations = entry.get("class"), entry.get("shape"), entry.get("activations")
    if kind not in _OPS or not isinstance(shape, list):
        raise ValueError(f"llmkern.json: a layer of the unknown class {kind!r}")
    bits = entry.get("num_bits") or (4 if "Int4" in kind else 8)
    codes = "weight" not in leaves or leaves["weight"].dtype == "I8"
    if not codes:
        bits = BITS[leaves["weight"].dtype]
    group = entry.get("group_size")
    return {
        "format": kind, "shape": shape, "bits": bits, "group_size": None if group == shape[1] else group,
        "symmetric": "weight_zero_point" not in leaves if codes else None, "act_order": entry.get("act_order"),
        "sparsity": SPARSITY.get(kind), "activations": activations, "op": _op(kind, activations),
    }  # fmt: skip


def _unread(leaf: str, stored: Stored, quantization: dict[str, Any]) -> dict[str, Any]:
    """A dense layer, or one whose codes are not read here, as its config has it."""
    row: dict[str, Any] = {"format": _STORED[leaf], "shape": list(stored.shape)}
    if leaf == "weight":
        return {**row, "bits": BITS.get(stored.dtype)}
    bits, group = quantization.get("bits"), quantization.get("group_size")
    if leaf == "qweight" and type(bits) is int and 0 < bits <= 32:
        row["shape"] = [stored.shape[1], stored.shape[0] * 32 // bits]
    return {**row, "bits": bits, "group_size": group if group != -1 else None}


def _kernel(op: str) -> str:
    """The first row of the op that can run on this machine's CPU."""
    import llmkern

    return next(row.kernel for row in llmkern.kernels(op) if row.runnable and row.device in ("cpu", "any"))


def _recipe(details: Any) -> str | None:
    """The short form of the recipe's fields."""
    if not isinstance(details, dict):
        return None
    from llmkern.recipe import Recipe

    return str(Recipe.from_dict(details))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config, of config.json or of the file of its own that older checkpoints have."""
    found = config.get("quantization_config") or config.get("compression_config")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if not found and config and (path / name).is_file():
            found = {"quant_method": method, **read_json(path / name)}
    return found if isinstance(found, dict) else {}


def show(result: dict[str, Any]) -> str:
    """A line per kind of layer, then a line per layer, then the sums."""
    facts = [(name, result[name]) for name in ("model_type", "quant_method", "recipe") if result[name]]
    lines = [f"{result['path']}: " + ", ".join(f"{name} {value}" for name, value in facts)]
    rows = [
        (
            layer["name"],
            layer["format"],
            "x".join(map(str, layer["shape"])),
            f"{layer['bits']:g}" if layer["bits"] else "?",
            str(layer["group_size"] or "-"),
            ", ".join(_remarks(layer)) or "-",
            Number(layer["bytes"] / 1e6, 3),
            " ".join(filter(None, (layer["op"], layer["kernel"]))) or "torch",
        )
        for layer in result["layers"]
    ]
    lines += ["", table(("layer", "format", "N x K", "bits", "group", "more", "MB", "runs here"), rows), ""]
    kinds = Counter((layer["format"], layer["bits"]) for layer in result["layers"])
    lines += [f"{count} layers {kind}, {f'{bits:g}' if bits else '?'} bits" for (kind, bits), count in kinds.items()]
    lines.append(f"{megabytes(result['layer_bytes'])} MB in layers, {megabytes(result['other_bytes'])} MB in the rest")
    return "\n".join([*lines, *result["notes"]])


def _remarks(layer: dict[str, Any]) -> Iterator[str]:
    """What a layer has beside bits and groups."""
    if layer["sparsity"]:
        yield layer["sparsity"]
    if layer["symmetric"] is False:
        yield "asymmetric"
    if layer["act_order"]:
        yield "act-order"
    if layer["activations"]:
        yield f"{layer['activations']} activations"
