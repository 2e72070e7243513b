"""A folder that others wrote: its files, its quantization_config, which tensors are a layer's; `describe`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._json import read_object
from llmkern.checkpoint_folder import META
from llmkern.checkpoints import layers
from llmkern.checkpoints.scheme import BadTensor, Scheme, Schemes, check_parts
from llmkern.weight_files import DTYPES, INDEX, WEIGHTS, Files, Lazy, Stored

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Tensors that only a layer of codes has.
MARKS = frozenset({
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
    "weight_g_idx", "compressed", "bitmask", "row_offsets", "scale_packed", "meta", "input_scale", "input_zero_point",
})  # fmt: skip
# What else may be in such a layer, under a name that dense layers have too.
SHARED = frozenset({"shape", "weight", "bias"})
# Scales of a quantized cache of keys and values, which is kept as it is here.
CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")


class Folder:
    """config.json, the headers of the safetensors, and what the quantization_config says of each layer.

    Raises FileNotFoundError without config.json or safetensors, ValueError for what is broken or not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"load: {self.path} holds no config.json, so it is no model folder")
        self.config = read_object(self.path / "config.json", "load")
        try:
            self.schemes: Schemes = layers.parse(quantization(self.path, self.config))
        except ValueError as error:
            raise ValueError(f"load: {self.path}: {error}") from None
        self.files = _files(self.path)
        self.layers = self._layers()

    def _layers(self) -> dict[str, dict[str, str]]:
        """Layers of codes: name -> leaf -> the tensor of the files."""
        names = [key.rpartition(".") for key in self.files.tensors]
        coded = {layer for layer, _, leaf in names if leaf in MARKS}
        found: dict[str, dict[str, str]] = {}
        for layer, _, leaf in names:
            if layer in coded and (leaf in MARKS or leaf in SHARED):
                found.setdefault(layer, {})[leaf] = f"{layer}.{leaf}"
        return found

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        stored = self.files.tensors[key]
        if stored.dtype not in DTYPES:
            raise ValueError(f"load: {stored.path}: tensor {key!r} is {stored.dtype}, of which no layer is made")
        return Lazy(key, stored, "load")[...]

    def wrong(self, layer: str, error: BadTensor) -> ValueError:
        """The error with the file and the tensor in it."""
        key = f"{layer}.{error.leaf}"
        stored = self.files.tensors.get(key)
        path = stored.path if stored else self.files.tensors[next(iter(self.layers[layer].values()))].path
        return ValueError(f"load: {path}: tensor {key!r} {error.text}")

    def scheme(self, layer: str, kind: str = "Linear", also: tuple[str, ...] = ()) -> Scheme:
        """The scheme of a layer of codes. ValueError where the config does not mean it."""
        try:
            found = self.schemes.of(layer, kind, also)
        except ValueError as error:
            raise ValueError(f"load: {self.path}: {error}") from None
        if found is None:
            key = next(iter(self.layers[layer].values()))
            raise ValueError(
                f"load: {self.files.tensors[key].path}: {layer} is stored as codes ({', '.join(self.layers[layer])}), "
                "but the quantization_config leaves it dense"
            )
        return found


def quantization(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config: that of config.json, or of a file of its own, which may also add to it.

    ValueError where there is none, or the two differ in what decides how bytes are read.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"config.json: quantization_config must be an object, got {found!r:.80}")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if not (folder / name).is_file():
            continue
        own = {"quant_method": method, **read_object(folder / name, "load")}
        if found is None:
            return own
        for key in ("bits", "group_size", "sym", "checkpoint_format", "zero_point"):
            if key in found and key in own and found[key] != own[key]:
                raise ValueError(f"{name} says {key} {own[key]!r}, config.json says {found[key]!r}")
        return {**own, **found} if own["quant_method"] == found.get("quant_method") else found
    if found is None:
        raise ValueError(
            f"it holds no {META} and its config.json no quantization_config: its weights are not packed; load them "
            "with transformers"
        )
    if "config_groups" in found or "sparsity_config" in found:
        return {"quant_method": "compressed-tensors", **found}
    return found


def names_quantization(folder: Path) -> bool:
    """Whether a model folder of others says that its weights are quantized, in config.json or in a file of its own."""
    config = read_object(folder / "config.json", "load")
    own = ("quantize_config.json", "quant_config.json")
    known = config.get("quantization_config") or config.get("compression_config")
    return bool(known) or any((folder / name).is_file() for name in own)


def is_read(folder: Path) -> bool:
    """Whether the weights of a model folder of others are quantized by a method that is read here."""
    if not names_quantization(folder):
        return False
    method = quantization(folder, read_object(folder / "config.json", "load")).get("quant_method")
    return isinstance(method, str) and method in layers.METHODS


def _files(folder: Path) -> Files:
    """The safetensors of a folder, none of which is outside it."""
    own = sorted(folder.glob("*.safetensors"))
    if not own and (pickled := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))):
        raise ValueError(
            f"load: {folder} holds its weights as {pickled[0]}: reading a pickle runs code of the file, so it is not "
            "read; convert it to safetensors"
        )
    standard = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    # AutoGPTQ names its one file after bits and groups.
    files = Files(folder, "load", own if not standard and len(own) == 1 else None)
    # The hub's cache is a folder of links into the folder of blobs beside it.
    allowed = {folder.resolve(), (folder.resolve().parent.parent / "blobs")}
    for path in {stored.path for stored in files.tensors.values()}:
        if path.resolve().parent not in allowed:
            raise ValueError(f"load: {path} is a link out of its folder, to {path.resolve()}")
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        for key, name in read_object(folder / INDEX, "load")["weight_map"].items():
            if key not in files.tensors or files.tensors[key].path.name != name:
                raise ValueError(f"load: {folder / INDEX}: tensor {key!r} is not in {name}, where it should be")
    return files


@dataclass(frozen=True)
class LayerInfo:
    """One matrix of a checkpoint. packed: the class it becomes, None for a dense one; group_size: None per row."""

    name: str
    format: str
    packed: str | None
    shape: tuple[int, ...]
    bits: int | None
    symmetric: bool | None
    group_size: int | None
    act_order: bool
    activations: str | None
    nbytes: int


@dataclass(frozen=True)
class Description:
    """What is in a checkpoint. layer_bytes: of `layers`; nbytes: of all tensors; notes: what runs otherwise."""

    path: str
    method: str
    formats: tuple[str, ...]
    layers: tuple[LayerInfo, ...]
    layer_bytes: int
    nbytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(path: str | Path) -> Description:
    """What is in a folder, from its headers (and the few bytes that hold a layer's shape): no model is built.

    Every layer of codes is checked against its format, as far as headers go. Raises as `read_model`.
    """
    folder = Path(path).expanduser()
    if (folder / META).is_file():
        return _describe_ours(folder)
    opened = Folder(folder)
    tensors = opened.files.tensors
    found = [*_coded(opened), *_dense(tensors, opened.layers)]
    return Description(
        path=str(path),
        method=opened.schemes.method,
        formats=opened.schemes.formats,
        layers=tuple(found),
        layer_bytes=sum(layer.nbytes for layer in found),
        nbytes=sum(stored.nbytes for stored in tensors.values()),
        notes=opened.schemes.notes,
    )


def _coded(folder: Folder) -> Iterator[LayerInfo]:
    for name, leaves in folder.layers.items():
        scheme = folder.scheme(name)
        own = {leaf: folder.files.tensors[key] for leaf, key in leaves.items() if leaf != "bias"}
        try:
            shape = _shape(folder, scheme, name, own)
            parts = layers.layout(scheme, shape)
            check_parts(parts, {leaf: _header(leaf, stored) for leaf, stored in own.items()})
        except BadTensor as error:
            raise folder.wrong(name, error) from None
        yield LayerInfo(
            name, scheme.format, scheme.packed, shape, scheme.bits or None, scheme.symmetric, scheme.group_size,
            scheme.act_order, scheme.activations, sum(stored.nbytes for stored in own.values()),
        )  # fmt: skip


def _dense(tensors: Mapping[str, Stored], coded: Mapping[str, Any]) -> Iterator[LayerInfo]:
    for key, stored in tensors.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and len(stored.shape) == 2 and name not in coded:
            bits = DTYPES[stored.dtype].itemsize * 8 if stored.dtype in DTYPES else None
            yield LayerInfo(name, "dense", None, stored.shape, bits, None, None, False, None, stored.nbytes)


def _header(leaf: str, stored: Stored) -> Tensor:
    """A tensor of the dtype and shape of a header, without values."""
    if stored.dtype not in DTYPES:
        raise BadTensor(leaf, f"is {stored.dtype}, of which no layer is made")
    return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")


def _shape(folder: Folder, scheme: Scheme, name: str, own: Mapping[str, Stored]) -> tuple[int, int]:
    """[N, K] of a layer of codes."""
    main, rows = MAIN[scheme.format]
    for leaf in (main, rows):
        if leaf not in own:
            raise BadTensor(leaf, f"is missing; got {', '.join(sorted(own))}")
    first, second = own[main].shape, own[rows].shape
    if scheme.format in ("pack-quantized", "sparse-24-bitmask", "sparse-bitmask"):
        if own[rows].dtype not in ("I64", "I32") or second not in ((2,), (2, 1)):
            raise BadTensor(rows, f"must be int64 [2], got {own[rows].dtype} {list(second)}")
        n, k = folder.read(f"{name}.{rows}").flatten().tolist()
        if n < 1 or k < 1:
            raise BadTensor(rows, f"must hold two sizes, got {[n, k]}")
        return n, k
    if len(first) != 2 or len(second) != 2:
        raise BadTensor(main if len(first) != 2 else rows, f"must have two dimensions, got {list(first)}")
    if scheme.format == "marlin-24":
        return second[1], first[0] * 32
    if scheme.format == "awq":
        return first[1] * 8, first[0]
    return first if scheme.format == "int-quantized" else (first[1], first[0] * 32 // scheme.bits)


# The tensors that tell a layer's shape.
MAIN = {
    "pack-quantized": ("weight_packed", "weight_shape"),
    "int-quantized": ("weight", "weight"),
    "gptq": ("qweight", "scales"),
    "gptq_v2": ("qweight", "scales"),
    "awq": ("qweight", "scales"),
    "sparse-24-bitmask": ("compressed", "shape"),
    "sparse-bitmask": ("compressed", "shape"),
    "marlin-24": ("weight_packed", "scale_packed"),
}


def _describe_ours(folder: Path) -> Description:
    """A folder that `llmkern.save` wrote, as its llmkern.json has it."""
    meta, files = read_object(folder / META, "load"), Files(folder, "load")
    entries = meta.get("layers")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"load: {folder / META} must hold layers by name")
    sizes: dict[str, int] = {}
    for key, stored in files.tensors.items():
        name, _, leaf = key.rpartition(".")
        sizes[name] = sizes.get(name, 0) + (0 if leaf == "bias" else stored.nbytes)
    found = []
    for name, entry in entries.items():
        kind, group = str(entry.get("class")), entry.get("group_size")
        shape = tuple(entry["shape"]) if isinstance(entry.get("shape"), list) else ()
        found.append(
 LayerInfo(
            name, str(meta.get("format")), kind, shape, 4 if "Int4" in kind else 8 if "Int8" in kind else None, None,
            None if shape and group == shape[1] else group, bool(entry.get("input_order")), entry.get("activations"),
            sizes.get(name, 0),
        ))  # fmt: skip
    found += _dense(files.tensors, entries)
    return Description(
        str(folder), "llmkern", (str(meta.get("format")),), tuple(found), sum(layer.nbytes for layer in found),
        sum(stored.nbytes for stored in files.tensors.values()), (),
    )  # fmt: skip
