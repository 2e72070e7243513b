"""The tensors of packed experts under the names that stock readers know, and back.

    Experts                                      the file (Mixtral; other models have other names)
    model.layers.0.mlp.experts.3.gate_up_proj    model.layers.0.block_sparse_moe.experts.3.w1, then ....w3 below it
    model.layers.0.mlp.experts.3.down_proj       model.layers.0.block_sparse_moe.experts.3.w2
    model.layers.0.mlp.gate.weight               model.layers.0.block_sparse_moe.gate.weight

transformers makes one 3-D parameter of the experts' matrices when it loads; its own rules for that say what they are
called in a file, and it unpacks `pack-quantized` experts on the way. A mixture that it has no such rule for (gpt-oss),
or whose layers are not all of one symmetric scheme, stays under our names, which only `llmkern.load` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.experts import Experts
from llmkern.formats.gptq_checkpoint import MULTIPLE
from llmkern.weight_writer import Later

PATTERN = r"re:.*\.experts\.\d+\..*"  # what a scheme of experts is for
PLAIN = re.compile(r"[\w.]+")
# Along which dimension a tensor of a layer is that of its parts; None where it is the same for each.
ALONG: dict[str, dict[str, int | None]] = {
    "compressed-tensors": {"weight_packed": 0, "weight_scale": 0, "weight_shape": 0},
    "gptq": {"qweight": 1, "qzeros": 1, "scales": 1, "g_idx": None},
}


class Renamed(NamedTuple):
    """parts: layer -> the names of the matrices whose rows, one below the other, are its own. others: name in the file
    -> name in the model.
    """

    parts: dict[str, list[str]]
    others: dict[str, str]


def rename(
    model: Any,
    tensors: dict[str, Tensor | Later],
    homes: Mapping[str, Experts],
    schemes: Mapping[str, Any],
    format: str,
) -> Renamed | None:
    """Bring the mixtures `homes` under the names that stock readers know; None if that is not possible for all.

    homes: at least one; schemes: layer -> its scheme, of layers that are stored in words.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = get_model_conversion_mapping(model)
    parts: dict[str, list[str]] = {}
    for home, mixture in homes.items():
        leaves = _leaves(rules, home)
        own = {f"{home}.{at}.{leaf}": leaf for at in range(mixture.num_experts) for leaf in mixture.projections(at)}
        if not set(own.values()) <= leaves.keys() or mixture.transposed or mixture.gating.state_dict():
            return None
        if not own.keys() <= schemes.keys():
            return None
        for name, leaf in own.items():
            if not _divides(name, tensors, len(leaves[leaf]), format):
                return None
            parts[name] = [f"{_in_file(rules, name).rpartition('.')[0]}.{part}" for part in leaves[leaf]]
    kinds = [schemes[name] for name in parts]
    if not kinds[0].get("symmetric", True) or any(kind != kinds[0] for kind in kinds):
        return None
    others = {}
    for home in homes:
        parent = home.rpartition(".")[0] + "."
        for name in [name for name in tensors if name.startswith(parent) and not name.startswith(f"{home}.")]:
            if (new := _in_file(rules, name)) != name:
                tensors[new] = tensors.pop(name)
                others[new] = name
    for name, names in parts.items():
        for suffix, along in ALONG[format].items():
            whole = tensors.pop(f"{name}.{suffix}")
            for at, part in enumerate(names):
                tensors[f"{part}.{suffix}"] = _part(whole, at, len(names), along)
    return Renamed(parts, others)


def join(name: str, parts: list[dict[str, Tensor]], format: str) -> dict[str, Tensor]:
    """The tensors of a layer from those of its parts by suffix. ValueError unless they are parts of one matrix."""
    suffixes = ALONG.get(format, {})
    if not parts or not suffixes or any(part.keys() != suffixes.keys() for part in parts):
        found = ", ".join(sorted(set().union(*parts))) or "none"
        raise ValueError(f"load: layer {name}: each part must have {', '.join(suffixes)}; got {found}")
    joined = {}
    for suffix, along in suffixes.items():
        whole = _joined([part[suffix] for part in parts], along)
        if whole is None:
            raise ValueError(f"load: layer {name}: the {suffix} of its parts do not fit together")
        joined[suffix] = whole
    if "weight_shape" in joined:
        rows = [part["weight_scale"].shape[0] for part in parts]
        shapes = joined["weight_shape"].tolist()
        if len(shapes) != 2 * len(rows) or shapes[::2] != rows or len(set(shapes[1::2])) != 1:
            raise ValueError(f"load: layer {name}: its parts have weight_shape {shapes!s:.100}, but {rows} rows")
        joined["weight_shape"] = torch.tensor([sum(rows), shapes[1]])
    return joined


def _joined(tensors: list[Tensor], along: int | None) -> Tensor | None:
    """The tensors one after the other, or the one that all are; None where that is not possible."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        return None
    if along is None:
        return tensors[0] if all(torch.equal(tensor, tensors[0]) for tensor in tensors) else None
    try:
        return torch.cat(tensors, along)
    except (RuntimeError, IndexError):  # other shapes, or no such dimension
        return None


def _leaves(rules: list[Any], home: str) -> dict[str, list[str]]:
    """Projection -> the last names of its parts in a file, as transformers' rules for loading have them."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    found = {}
    for rule in rules:
        if not isinstance(rule, WeightConverter) or len(rule.target_patterns) != 1:
            continue
        kinds = [type(step) for step in rule.operations]
        rows = [getattr(step, "dim", None) for step in rule.operations]
        parts = [re.fullmatch(r"[\w.]*experts\.\*\.(\w+)\.weight", source) for source in rule.source_patterns]
        stacked = (kinds, rows) == ([MergeModulelist], [0]) and len(parts) == 1
        beneath = (kinds, rows) == ([MergeModulelist, Concatenate], [0, 1])
        target = rule.target_patterns[0].rpartition(".")
        if (stacked or beneath) and home.endswith(target[0]) and all(parts):
            found[target[2]] = [part[1] for part in parts if part]
    return found


def _in_file(rules: list[Any], name: str) -> str:
    """A tensor's name in a file, where transformers renames it when it loads."""
    from transformers.core_model_loading import WeightRenaming

    for rule in rules:
        if isinstance(rule, WeightRenaming) and len(rule.source_patterns) == 1 == len(rule.target_patterns):
            source, target = rule.source_patterns[0], rule.target_patterns[0]
            if PLAIN.fullmatch(source) and PLAIN.fullmatch(target):
                name = name.replace(target, source)
    return name


def _divides(name: str, tensors: Mapping[str, Tensor | Later], count: int, format: str) -> bool:
    """Whether the layer's tensors can be divided into those of `count` equal parts, word by word."""
    shapes = {suffix: tensors[f"{name}.{suffix}"].shape for suffix in ALONG[format]}
    sizes = [shapes[suffix][along] for suffix, along in ALONG[format].items() if along is not None]
    if format == "gptq" and shapes["qweight"][1] // count % MULTIPLE:
        return False
    return f"{name}.bias" not in tensors and not any(size % count for size in sizes if count > 1)


def _part(whole: Tensor | Later, at: int, count: int, along: int | None) -> Tensor | Later:
    """Part `at` of a layer's tensor; of `weight_shape` [N, K], what it is of a part."""
    if along is None or count == 1:
        return whole
    if len(whole.shape) == 1:
        n, k = whole.tolist() if isinstance(whole, Tensor) else whole.make().tolist()
        return torch.tensor([n // count, k])
    if isinstance(whole, Tensor):
        return whole.chunk(count, along)[at]
    shape = list(whole.shape)
    shape[along] //= count
    return Later(whole.dtype, torch.Size(shape), lambda: whole.make().chunk(count, along)[at])
