"""What the quantization_config of a compressed-tensors checkpoint says of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkern.checkpoints.scheme import Scheme, Schemes, choice, integer
from llmkern.checkpoints.targets import Targets

WHERE = "quantization_config (compressed-tensors)"
PACKED, BYTES, MARLIN, DENSE = "pack-quantized", "int-quantized", "marlin-24", "dense"
SPARSE = ("sparse-24-bitmask", "sparse-bitmask")
# Layouts that are known, and why they are not read.
REFUSED = {
    "float-quantized": "its weights are 8-bit floats, for which no op is here",
    "naive-quantized": "it does not tell codes of integers from those of floats",
    "nvfp4-pack-quantized": "its weights are 4-bit floats, for which no op is here",
    "mxfp4-pack-quantized": "its weights are 4-bit floats, for which no op is here",
    "mxfp8-quantized": "its weights are 8-bit floats, for which no op is here",
    "llmkern": "it was written by llmkern.save, and its llmkern.json is missing",
}
BY_INDEX = ("group", "dynamic", True)  # values of actorder that come with weight_g_idx


class CompressedTensorsSchemes(Schemes):
    """Groups of targets, each with a scheme, and a list of layers that stay dense."""

    method = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """ValueError for formats that are not read, and for settings that are not possible."""
        if isinstance(inner := config.get("quantization_config"), dict):
            config = {**inner, **{key: value for key, value in config.items() if key != "quantization_config"}}
        notes: list[str] = []
        if config.get("transform_config"):
            raise ValueError(f"{WHERE}: transform_config: layers that turn their inputs first are not read")
        if config.get("kv_cache_scheme"):
            notes.append("the cache of keys and values is kept as it is, where the config quantizes it")
        choice(config, "quantization_status", "compressed", ("compressed", None), WHERE)
        self.default = config.get("format") or DENSE
        self.word_layout = _word_layout(config.get("version"))
        self.ignored = Targets(_list(config, "ignore"), f"{WHERE}: ignore")
        self.sparse, self.sparse_targets, self.sparse_ignored = self._sparsity(config.get("sparsity_config"))
        groups = config.get("config_groups") or {}
        if not isinstance(groups, dict):
            raise ValueError(f"{WHERE}: config_groups must be an object, got {groups!r:.80}")
        self.groups = [self._group(name, group, notes) for name, group in groups.items()]
        if not self.groups and self.default not in (DENSE, *SPARSE):
            raise ValueError(f"{WHERE}: format {self.default!r} needs config_groups, which are empty")
        found = [scheme.format for _, scheme in self.groups if scheme]
        found += [self.sparse] if self.sparse and not self.groups else []
        super().__init__(tuple(dict.fromkeys(found)) or (DENSE,), tuple(dict.fromkeys(notes)))

    def of(self, name: str, kind: str = "Linear", also: tuple[str, ...] = ()) -> Scheme | None:
        """The scheme of a module: that of the group which means it most exactly, the first of several."""
        names = (name, *also)
        sparse = self._is_sparse(names, kind)
        if self.groups and self.ignored.rank(names, kind) is None:
            ranks = [(targets.rank(names, kind), at) for at, (targets, _) in enumerate(self.groups)]
            meant = [(rank, at) for rank, at in ranks if rank is not None]
            if meant:
                scheme = self.groups[min(meant)[1]][1]
                if scheme is None or not sparse:
                    return scheme
                return self._both(scheme, name)
        return Scheme(self.sparse) if self.sparse and sparse else None

    def _is_sparse(self, names: tuple[str, ...], kind: str) -> bool:
        meant = self.sparse_targets.rank(names, kind) is not None
        return bool(self.sparse) and meant and self.sparse_ignored.rank(names, kind) is None

    def _both(self, scheme: Scheme, name: str) -> Scheme:
        """Codes of which only the kept ones are stored."""
        if scheme.format != BYTES or not scheme.symmetric or scheme.per_tensor or scheme.bits != 8:
            raise ValueError(
                f"{WHERE}: {name}: {self.sparse} goes with symmetric 8-bit codes as int-quantized stores them, not "
                f"with {scheme.format} of {scheme.bits} bits"
            )
        assert self.sparse is not None
        return Scheme(self.sparse, 8, group_size=scheme.group_size)

    def _sparsity(self, config: Any) -> tuple[str | None, Targets, Targets]:
        config = config or {}
        if not isinstance(config, dict):
            raise ValueError(f"{WHERE}: sparsity_config must be an object, got {config!r:.80}")
        where = f"{WHERE}: sparsity_config"
        named = choice(config, "format", DENSE, (DENSE, *SPARSE), where)
        if named == DENSE:
            return None, Targets((), where), Targets((), where)
        targets = _list(config, "targets") or ["Linear"]
        return named, Targets(targets, where), Targets(_list(config, "ignore"), where)

    def _group(self, name: str, group: Any, notes: list[str]) -> tuple[Targets, Scheme | None]:
        where = f"{WHERE}: config_groups: {name}"
        if not isinstance(group, dict):
            raise ValueError(f"{where} must be an object, got {group!r:.80}")
        targets = Targets(_list(group, "targets"), where)
        weights = group.get("weights")
        layout = group.get("format") or self.default
        if weights is None or layout == DENSE:
            return targets, None
        if layout in REFUSED:
            raise ValueError(f"{where}: format {layout!r} is not read: {REFUSED[layout]}")
        if layout not in (PACKED, BYTES, MARLIN):
            raise ValueError(f"{where}: format must be {PACKED}, {BYTES}, {MARLIN} or {DENSE}, got {layout!r:.80}")
        if not isinstance(weights, dict):
            raise ValueError(f"{where}: weights must be an object, got {weights!r:.80}")
        scheme = self._weights(weights, layout, f"{where}: weights")
        if group.get("output_activations"):
            notes.append("outputs are kept as they are, where the config quantizes them")
        sparse = layout == MARLIN or bool(self.sparse)
        activations = _activations(group.get("input_activations"), f"{where}: input_activations", sparse, notes)
        return targets, Scheme(**{**vars(scheme), "activations": activations})

    def _weights(self, weights: dict[str, Any], layout: str, where: str) -> Scheme:
        bits = integer(weights, "num_bits", where)
        kind = choice(weights, "type", "int", ("int", "float"), where)
        if kind == "float":
            raise ValueError(f"{where}: type 'float': codes that are floats of {bits} bits are not read")
        if not 2 <= bits <= 8:
            raise ValueError(f"{where}: num_bits must be in [2, 8], got {bits}")
        choice(weights, "dynamic", False, (False, None), where)
        symmetric = choice(weights, "symmetric", True, (True, False), where)
        known = ("group", "channel", "tensor")
        strategy = choice(weights, "strategy", "group" if weights.get("group_size") else "tensor", known, where)
        order = choice(weights, "actorder", None, (None, False, "static", "weight", *BY_INDEX), where)
        group_size = integer(weights, "group_size", where) if strategy == "group" else None
        if group_size is not None and group_size < 1:
            if group_size != -1:
                raise ValueError(f"{where}: group_size must be -1 or at least 1, got {group_size}")
            group_size = None
        if layout == MARLIN and (bits not in (4, 8) or not symmetric or strategy == "tensor"):
            raise ValueError(f"{where}: marlin-24 holds symmetric codes of 4 or 8 bits per group or channel")
        if layout == MARLIN and group_size not in (None, 128):
            raise ValueError(f"{where}: marlin-24 has groups of 128 columns, got group_size {group_size}")
        return Scheme(
            layout, bits, symmetric, group_size, strategy == "tensor", order in BY_INDEX, word_layout=self.word_layout
        )


def _activations(config: Any, where: str, sparse: bool, notes: list[str]) -> str | None:
    """What is done to x: int8 per token where the config has x in 8-bit integers, else nothing; `notes` say so."""
    if config is None:
        return None
    if not isinstance(config, dict):
        raise ValueError(f"{where} must be an object, got {config!r:.80}")
    bits, kind = config.get("num_bits", 8), config.get("type", "int")
    if kind != "int" or bits != 8 or sparse:
        what = "layers are sparse" if sparse else f"the config has {bits}-bit {kind}"
        notes.append(f"activations are kept as they are: {what}, and no op quantizes them so")
        return None
    if config.get("dynamic") is not True:
        notes.append("activations are quantized per token as they come; the config's fixed scales are not used")
    elif config.get("strategy") != "token" or config.get("symmetric", True) is not True:
        notes.append("activations are quantized per token, symmetrically, where the config says otherwise")
    return "int8"


def _word_layout(version: Any) -> str | None:
    """How the package of this version puts codes into words; None where it does not say."""
    parts = str(version).split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts[:2]):
        return None
    return "dense" if (int(parts[0]), int(parts[1])) >= (0, 18) else "padded"


def _list(config: Mapping[str, Any], key: str) -> list[Any]:
    found = config.get(key) or []
    if not isinstance(found, list):
        raise ValueError(f"{WHERE}: {key} must be a list, got {found!r:.80}")
    return found
