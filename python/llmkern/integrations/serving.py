"""What the servers' plug-ins share: which layer is stored how, the parameters that a server's loader fills, and the
packed layer that they become.

vLLM's and SGLang's loaders are one design: a linear layer asks its quantization method to create parameters of this
rank's size; the attributes `input_dim`, `output_dim`, `packed_dim` and `packed_factor` tell `weight_loader` which part
of a tensor of the file belongs to this rank, and where the parts of a fused layer (q, k and v) go.

A tensor that the files lack would stay uninitialized there, so every load is counted here and a gap is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern import checkpoints
from llmkern.checkpoints import Layer, Scheme, Schemes
from llmkern.formats import BitmaskWeight, Sparse24Weight
from llmkern.nn import PackedLinear
from llmkern.weight_files import Files

NAME = "llmkern"
CONFIG_FILE = "llmkern.json"  # of a folder that llmkern wrote; for one whose config.json has no quantization_config
SERVED = ("pack-quantized", "int-quantized", "gptq", "gptq_v2", "awq")


class Slot(NamedTuple):
    """A parameter that the server's loader fills: its shape on this rank, and what the loader must know of its axes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    input_dim: int | None = None
    output_dim: int | None = None
    packed_dim: int | None = None
    packed_factor: int | Fraction | None = None
    optional: bool = False


@dataclass(frozen=True)
class Pruned:
    """A layer that a folder of ours stores as dense values with zeros: `kind` is the packed class that it becomes."""

    kind: str


# Leaf -> the axes of K and N and the axis along which codes share words, by the layout's definition.
CT_AXES = {
    "weight": (1, 0, None), "weight_packed": (1, 0, 1), "weight_scale": (1, 0, None), "weight_zero_point": (1, 0, 0),
    "weight_shape": (None, None, None), "weight_g_idx": (0, None, None), "input_scale": (None, None, None),
    "input_zero_point": (None, None, None),
}  # fmt: skip
GPTQ_AXES = {"qweight": (0, 1, 0), "qzeros": (0, 1, 1), "scales": (0, 1, None), "g_idx": (0, None, None)}
AWQ_AXES = {**GPTQ_AXES, "qweight": (0, 1, 1)}
AXES = {"gptq": GPTQ_AXES, "gptq_v2": GPTQ_AXES, "awq": AWQ_AXES}
CODES = ".qweight"  # what a layer of gptq or awq has that a dense one has not
INDEXES = ("g_idx", "weight_g_idx")  # one for all parts of a fused layer


class Formats:
    """How each layer of a checkpoint is stored, by the names that a server gives its layers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: the quantization_config of config.json, or llmkern.json. ValueError for what is not served."""
        self.pruned: dict[str, Pruned] = {}
        self.schemes: Schemes | None = None
        self.head = bool(config.get("lm_head"))  # gptq and awq say so of it alone
        if "quant_method" not in config and isinstance(config.get("layers"), dict):
            self.pruned = {name: _pruned(name, entry) for name, entry in config["layers"].items()}
        else:
            self.schemes = checkpoints.parse(config)
        self.stored: frozenset[str] | None = None  # the layers with codes in the files, where they were looked at

    def look_at(self, folder: Path) -> None:
        """Note which layers of a local folder have codes: gptq and awq do not say which are dense. Headers only."""
        if self.schemes is not None and self.schemes.method in ("gptq", "awq"):
            names = Files(folder).tensors
            self.stored = frozenset(name.removesuffix(CODES) for name in names if name.endswith(CODES))

    def of(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> Scheme | Pruned | None:
        """The scheme of a server's layer, None where it is dense.

        fused: the last part of a layer's name -> those of the layers in it (qkv_proj -> q_proj, k_proj, v_proj).
        ValueError when they are stored differently, or in a way that is not served.
        """
        home, _, last = prefix.rpartition(".")
        names = [f"{home}.{part}" if home else part for part in fused.get(last, (last,))]
        found = [self._of(name) for name in names]
        if any(one != found[0] for one in found):
            differing = next(name for name, one in zip(names, found, strict=True) if one != found[0])
            raise ValueError(
                f"{NAME}: {prefix}: its parts are stored differently ({names[0]} and {differing}), and the server "
                "multiplies them as one; compress them alike"
            )
        scheme = found[0]
        if isinstance(scheme, Scheme) and (scheme.format not in SERVED or scheme.per_tensor):
            how = "one scale per tensor" if scheme.per_tensor else scheme.format
            raise ValueError(f"{NAME}: {prefix}: {how} is not served; `llmkern convert` makes a folder that is")
        return scheme

    def refuse_other(self, layer: nn.Module, prefix: str) -> None:
        """NotImplementedError for a mixture's experts, or an output head, with codes: only linear layers are served."""
        kinds = [kind.__name__ for kind in type(layer).__mro__]
        if any("MoE" in kind or "Experts" in kind for kind in kinds):
            inside = [f"{prefix}.0.{part}" for part in ("down_proj", "w2")]
            if self.stored is None:
                packed = any(self._of(name) is not None for name in inside)
            else:
                packed = any(name.startswith(f"{prefix}.") for name in self.stored)
        elif "ParallelLMHead" in kinds:
            by_name = self.schemes is None or self.schemes.method == "compressed-tensors"
            packed = self._of(prefix) is not None if by_name else self.head or prefix in (self.stored or ())
        else:
            return
        if packed:
            raise NotImplementedError(
                f"{NAME}: {prefix}: a {kinds[0]} with packed weights is not served, only linear layers are; leave it "
                "dense (`ignore` of the recipe)"
            )

    def _of(self, name: str) -> Scheme | Pruned | None:
        if self.schemes is None:
            return self.pruned.get(name)
        return None if self.stored is not None and name not in self.stored else self.schemes.of(name)


def _pruned(name: str, entry: Any) -> Pruned:
    kind = entry.get("class") if isinstance(entry, dict) else None
    if kind not in ("Sparse24Weight", "BitmaskWeight"):
        raise ValueError(f"{NAME}: {CONFIG_FILE}: layer {name} is a {kind!r}, of which config.json should tell")
    return Pruned(kind)


def slots(scheme: Scheme | Pruned, outputs: Sequence[int], k: int, k_whole: int, dtype: torch.dtype) -> dict[str, Slot]:
    """The parameters of a layer on this rank.

    outputs: rows of each part on this rank; k of k_whole: columns on this rank; dtype: the model's. ValueError where a
    rank's share would begin inside a group, a quad or a word.
    """
    n = sum(outputs)
    if isinstance(scheme, Pruned):
        _need(k == k_whole or k % 4 == 0, f"{k} columns per rank would part a quad of four; use fewer ranks")
        return {"weight": Slot((n, k), dtype, 1, 0)}
    whole = k == k_whole
    if not whole:
        _need(not scheme.act_order, "groups in the order of activations cannot be split over ranks by columns")
        size = scheme.group_size
        _need(size is None or k % size == 0, f"{k} columns per rank are no whole groups of {size}; use fewer ranks")
    axes = AXES.get(scheme.format, CT_AXES)
    found = {}
    for leaf, part in checkpoints.layout(scheme, (n, k)).items():
        input_dim, output_dim, packed_dim = axes[leaf]
        if scheme.format == "int-quantized":
            packed_dim = None
        per_row = scheme.group_size is None and leaf in ("weight_scale", "weight_zero_point", "scales", "qzeros")
        if packed_dim is not None and packed_dim == input_dim:
            _need(whole or k * scheme.bits % 32 == 0, f"{k} columns per rank are no whole words of {leaf}")
        if packed_dim is not None and packed_dim == output_dim and not (part.optional and scheme.symmetric):
            odd = next((rows for rows in outputs if rows * scheme.bits % 32), None)
            _need(odd is None, f"{odd} rows per rank are no whole words of {leaf}; use fewer ranks")
        # The widest type that the layout has: copying into it changes no value of the file.
        widest = max(part.dtypes, key=lambda one: one.itemsize)
        found[leaf] = Slot(
            part.shapes[0], widest, None if per_row else input_dim, output_dim, packed_dim,
            None if packed_dim is None else _factor(scheme.bits), part.optional,
        )  # fmt: skip
    return found


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise ValueError(why)


def _factor(bits: int) -> int | Fraction:
    return 32 // bits if 32 % bits == 0 else Fraction(32, bits)


class LinearMethod:
    """create_weights, process_weights_after_loading and apply of a server's linear method; one object per layer.

    A server's own class inherits from this and from the server's base.
    """

    def __init__(self, scheme: Scheme | Pruned, prefix: str) -> None:
        self.scheme, self.prefix = scheme, prefix
        self.slots: dict[str, Slot] = {}
        self.seen: dict[str, list[Any]] = {}
        self.outputs: list[int] = []
        self.columns, self.dtype = 0, torch.float32

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """Register this rank's parameters on `layer`, each with the attributes that the loader goes by."""
        self.outputs, self.columns, self.dtype = list(output_partition_sizes), input_size_per_partition, params_dtype
        try:
            self.slots = slots(self.scheme, self.outputs, input_size_per_partition, input_size, params_dtype)
        except ValueError as error:
            raise ValueError(f"{NAME}: {self.prefix}: {error}") from None
        loader = extra_weight_attrs.pop("weight_loader", None)
        for leaf, slot in self.slots.items():
            parameter = nn.Parameter(torch.empty(slot.shape, dtype=slot.dtype), requires_grad=False)
            attributes = {
                **{key: value for key, value in slot._asdict().items() if key not in ("shape", "dtype", "optional")},
                "pack_factor": slot.packed_factor,  # its name in SGLang's loaders
                "ignore_warning": True,
                **extra_weight_attrs,
            }
            for key, value in attributes.items():
                if value is not None:
                    setattr(parameter, key, value)
            parameter.weight_loader = self._watched(leaf, loader or _copy)  # type: ignore[attr-defined]
            layer.register_parameter(leaf, parameter)
            self.seen[leaf] = []

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the parameters by the packed layer. ValueError for a tensor that is missing or not legal."""
        if not self.slots:
            return
        tensors = {leaf: layer._parameters[leaf].detach() for leaf in self.slots if self._loaded(leaf)}  # type: ignore[union-attr]
        for leaf in self.slots:
            delattr(layer, leaf)
        self.slots = {}
        try:
            found = self._read(tensors)
        except ValueError as error:
            raise ValueError(f"{NAME}: {self.prefix}: {error}") from None
        activations = self.scheme.activations if isinstance(self.scheme, Scheme) else None
        layer.llmkern = PackedLinear(found.weight, activations=activations, input_order=found.input_order)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K of this rank] -> [..., N of this rank]."""
        return layer.llmkern.linear(x, bias)  # type: ignore[operator, union-attr]

    def _read(self, tensors: dict[str, Tensor]) -> Layer:
        shape = (sum(self.outputs), self.columns)
        if isinstance(self.scheme, Pruned):
            pack = {"Sparse24Weight": Sparse24Weight.pack, "BitmaskWeight": BitmaskWeight.pack}[self.scheme.kind]
            return Layer(pack(tensors["weight"]), None)
        tensors = {leaf: self._narrow(tensor) for leaf, tensor in tensors.items()}
        if "weight_shape" in tensors:  # that of the whole layer, or of its last part
            tensors["weight_shape"] = torch.tensor(shape, dtype=torch.int64, device=tensors["weight_shape"].device)
        for leaf in INDEXES:
            if leaf in tensors and not self.scheme.act_order:  # its groups are counted over all ranks
                tensors[leaf] = tensors[leaf] - tensors[leaf].min().clamp(min=0)
        return checkpoints.read_layer(self.scheme, tensors, shape, find_24=True)

    def _narrow(self, tensor: Tensor) -> Tensor:
        """Float tensors in the model's dtype where that holds the same values."""
        if not tensor.is_floating_point() or tensor.dtype == self.dtype:
            return tensor
        narrow = tensor.to(self.dtype)
        return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor

    def _watched(self, leaf: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """The server's loader, which also notes which parts of the parameter were filled."""

        def load(parameter: nn.Parameter, loaded: Tensor, *shard: Any, **named: Any) -> Any:
            before = parameter.detach().clone() if leaf in INDEXES and self.seen[leaf] else None
            result = loader(parameter, loaded, *shard, **named)
            if before is not None and not torch.equal(before, parameter):
                raise ValueError(f"{NAME}: {self.prefix}: {leaf} differs between the parts of a fused layer")
            part = shard[0] if shard else named.get("loaded_shard_id")
            self.seen[leaf] += part if isinstance(part, tuple) else [part]
            return result

        return load

    def _loaded(self, leaf: str) -> bool:
        """Whether the files had the tensor; ValueError if they lack it, or a part of it."""
        parts = set(self.seen[leaf])
        if None in parts or len(parts) >= len(self.outputs):
            return True
        if self.slots[leaf].optional and not parts:
            return False
        raise ValueError(f"{NAME}: {self.prefix}: the files lack {leaf} ({len(parts)} of {len(self.outputs)} parts)")


def _copy(parameter: nn.Parameter, loaded: Tensor) -> None:
    if parameter.shape != loaded.shape:
        raise ValueError(f"{NAME}: a tensor must be {list(parameter.shape)}, got {list(loaded.shape)}")
    parameter.data.copy_(loaded)


class Config:
    """What the QuantizationConfig of every server has in common; comes before the server's own base.

    The quantization_config of config.json (compressed-tensors, gptq or awq), or llmkern.json.
    """

    linear: type  # the server's linear layers, its method for dense ones, and ours on its base
    dense_method: type
    packed_method: type
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.formats = Formats(config)

    @classmethod
    def get_name(cls) -> str:
        """The name of the method."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """What ops take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Read where config.json has no quantization_config: our folders of pruned float weights."""
        return [CONFIG_FILE]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        """Of the quantization_config."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer; None for what is not linear."""
        if isinstance(layer, self.linear):
            scheme = self.formats.of(prefix, self.packed_modules_mapping)
            return self.dense_method() if scheme is None else self.packed_method(scheme, prefix)
        self.formats.refuse_other(layer, prefix)
        return None


def override(config: Mapping[str, Any] | None, wanted: str | None) -> str | None:
    """Whether `--quantization llmkern` takes a checkpoint over: only where it is asked for by name."""
    method = str((config or {}).get("quant_method", "")).lower().replace("_", "-")
    return NAME if wanted == NAME and method in ("gptq", "awq", "compressed-tensors") else None
