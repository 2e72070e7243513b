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
HELP = "What is in a checkpoint: formats, bits, groups, sizes, and the kernel that would run each layer here."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a model folder or one safetensors file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The config's words, one entry per layer, and sums."""
    path = args.path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    config, ours = {}, {}
    if path.is_dir():
        tensors = read_folder(path)
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        ours = read_json(path / "llmkern.json") if (path / "llmkern.json").is_file() else {}
    else:
        tensors = read_file(path)
    layers = _layers(tensors, config, ours)
    total = sum(stored.nbytes for stored in tensors.values())
    return {
        "path": str(args.path),
        "model_type": config.get("model_type"),
        "quant_method": _quantization(config).get("quant_method"),
        "recipe": _recipe(ours.get("recipe")),
        "layers": layers,
        "layer_bytes": sum(layer["bytes"] for layer in layers),
        "other_bytes": total - sum(layer["bytes"] for layer in layers),
        "bytes": total,
    }


# The tensor that tells how a layer is stored; the first that is there.
_STORED = {"weight_packed": "compressed-tensors", "qweight": "gptq", "weight": "dense"}
# What transformers calls the stacked weights of experts.
_EXPERTS = (".gate_up_proj", ".up_proj", ".down_proj")
_OPS = {
    "Int8Weight": "int8_linear",
    "Int4Weight": "int4_linear",
    "Sparse24Weight": "sparse24_linear",
    "Sparse24Int4Weight": "sparse24_int4_linear",
    "BitmaskWeight": "bitmask_linear",
}


def _layers(tensors: Mapping[str, Stored], config: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
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
        marks = [mark for mark in _STORED if mark in parts[layer]]
        ranks = (2, 3) if layer.endswith(_EXPERTS) else (2,)
        if not marks or len(parts[layer][marks[0]].shape) not in ranks:
            continue
        entry = known.get(layer)
        described = _ours(entry, parts[layer]) if isinstance(entry, dict) else _theirs(marks[0], parts[layer], config)
        size = sum(stored.nbytes for part, stored in parts[layer].items() if part != "bias")
        op = described["op"]
        found.append({"name": layer, **described, "bytes": size, "kernel": _kernel(op) if op else None})
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
    if "weight" in leaves and leaves["weight"].dtype != "I8":
        bits = BITS[leaves["weight"].dtype]
    op = "int8_dynamic_linear" if kind == "Int8Weight" and activations else _OPS[kind]
    group = entry.get("group_size")
    return {
        "format": kind, "shape": shape, "bits": bits, "group_size": None if group == shape[1] else group,
        "activations": activations, "op": op,
    }  # fmt: skip


def _theirs(leaf: str, leaves: dict[str, Stored], config: dict[str, Any]) -> dict[str, Any]:
    """A layer of anyone's checkpoint. `op` is None where no op of ours would run it as it is stored."""
    stored, quantization = leaves[leaf], _quantization(config)
    row: dict[str, Any] = {"format": _STORED[leaf], "shape": list(stored.shape)}
    row |= {"group_size": None, "activations": None, "op": None}
    if leaf == "weight":
        return {**row, "bits": BITS.get(stored.dtype)}
    scales = leaves.get("weight_scale", leaves.get("scales"))
    if leaf == "qweight":
        bits = quantization.get("bits")
        if type(bits) is int and 0 < bits <= 32:
            row["shape"] = [stored.shape[1], stored.shape[0] * 32 // bits]
        group = quantization.get("group_size")
        return {**row, "bits": bits, "group_size": group if group != -1 else None}
    groups = quantization.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    bits = {scheme.get("num_bits") for scheme in schemes}
    row["bits"] = bits.pop() if len(bits) == 1 else None
    if row["bits"]:
        row["shape"] = [stored.shape[0], stored.shape[1] * 32 // row["bits"]]
    if scales is not None and len(scales.shape) == 2 and scales.shape[1] > 1:
        row["group_size"] = next((scheme["group_size"] for scheme in schemes if scheme.get("group_size")), None)
    return row


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


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
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
            str(layer["bits"] or "?"),
            str(layer["group_size"] or "-"),
            Number(layer["bytes"] / 1e6, 3),
            " ".join(filter(None, (layer["op"], layer["kernel"]))) or "torch",
        )
        for layer in result["layers"]
    ]
    lines += ["", table(("layer", "format", "N x K", "bits", "group", "MB", "runs here"), rows), ""]
    kinds = Counter((layer["format"], layer["bits"]) for layer in result["layers"])
    lines += [f"{count} layers {kind}, {bits or '?'} bits" for (kind, bits), count in kinds.items()]
    lines.append(f"{megabytes(result['layer_bytes'])} MB in layers, {megabytes(result['other_bytes'])} MB in the rest")
    return "\n".join(lines)
