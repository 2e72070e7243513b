"""Recipe: what to do with which layer. Parsed, validated, matched against layer names; no tensors here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

BITS = (2, 3, 4, 8)
CASTS = {"bf16": "bfloat16", "fp16": "float16"}
QUANTIZERS = ("rtn", "gptq")
PRUNERS = ("magnitude", "wanda", "sparsegpt")
DATA_FREE = ("cast", "rtn", "magnitude", "pack")
METHODS = ("cast", *QUANTIZERS, *PRUNERS, "pack")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_IGNORE = ("lm_head",)
# All of it fits the calibration too closely: `bench.ablation`.
CORRECTION = 0.5
# A pattern of a recipe may come from someone else; a long one can make `re` run for ever.
MAX_PATTERN = 200
SHORT_FORMS = (
    "bf16, fp16, w8a8, rtn-int8, rtn-int4-g128, gptq-int4-g128, gptq-int4, gptq-int3-g64, gptq-w8a8, magnitude-0.5, "
    "wanda-2:4, sparsegpt-0.5, sparsegpt-2:4, sparsegpt-2:4-int4-g128, pack-2:4; -asym and -a8 may follow"
)


@dataclass(frozen=True)
class Recipe:
    """How to compress the linear layers of a model.

    method: "rtn", "gptq" (need `bits`), "magnitude", "wanda", "sparsegpt" (need `sparsity`; `bits` quantizes the kept
    values too), "cast" (the whole model to `dtype`), or "pack" (weights that are sparse already, values unchanged).
    group_size: columns per scale, None for one scale per row. sparsity: the pruned share (0.5), or "2:4". act_order,
    clip, damp, refit: see `llmkern.solvers`. objective: what an error of a layer is measured by, "model" (what it does
    to the distribution of the model's outputs, which takes a backward pass: `llmkern.fisher`) or "layer" (its own
    squared error, as published); None is "model" for gptq and sparsegpt, but "layer" for their published forms
    (act_order="dynamic", refit=False). input_correction: how much of what the layers before it have changed a layer
    makes up for, 0 (none) to 1 (all), see `llmkern.solvers.shift`; None is 0.5 for gptq and sparsegpt, but 0 for their
    published forms. descent, scale_refit: passes over the codes, and steps over the scales, once the columns are done;
    None is what the solver does by default. activations: "int8" quantizes them on the fly. dtype: of sparse values
    (default: the model's own if it has 16 bits, else bfloat16). scale_dtype: of scales (default: the model's own).
    targets: which linear layers (default all); ignore wins over targets. Both hold names (the whole dotted name or its
    last parts) or "re:" patterns, matched from the name's start; "lm_head" also means the output head under another
    name. overrides: (pattern, changes) pairs or a mapping, where changes are a mapping of fields, a short form, or None
    to leave the layer as it is. experts: which tokens calibrate an expert of a mixture: "routed" (those that reach it;
    one that none reaches is an error) or "all" (every token of its layer).

    Raises ValueError naming the field, what is wanted, and what it got.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    sparsity: float | str | None = None
    symmetric: bool = True
    act_order: str | None = "static"
    clip: str | None = "hessian"
    damp: float = 0.01
    refit: bool = True
    objective: str | None = None
    input_correction: float | None = None
    descent: int | None = None
    scale_refit: int | None = None
    activations: str | None = None
    dtype: str | None = None
    scale_dtype: str | None = None
    experts: str = "routed"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    overrides: tuple[tuple[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("dtype", "scale_dtype"):
            if isinstance(value := getattr(self, name), torch.dtype):
                object.__setattr__(self, name, str(value).removeprefix("torch."))
        for name in ("targets", "ignore"):
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) else value
            if not isinstance(value, Iterable):
                raise ValueError(f"recipe: {name} must be a pattern or a list of patterns, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        try:
            pairs = tuple((pattern, changes) for pattern, changes in pairs)
        except (TypeError, ValueError):
            wanted = "a mapping of patterns to changes"
            raise ValueError(f"recipe: overrides must be {wanted}, got {self.overrides!r}") from None
        object.__setattr__(self, "overrides", pairs)
        self._validate()

    def _validate(self) -> None:
        def require(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"recipe: {name} must be {wanted}, got {getattr(self, name)!r}")

        require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        require(self.bits is None or (type(self.bits) is int and self.bits in BITS), "bits", f"None or one of {BITS}")
        ok = self.group_size is None or (type(self.group_size) is int and self.group_size > 0)
        require(ok, "group_size", "None (one group per row) or a positive int")
        require(self.sparsity is None or _is_sparsity(self.sparsity), "sparsity", 'in (0, 1) or "n:m"')
        require(self.act_order in (None, "static", "dynamic"), "act_order", 'None, "static" or "dynamic"')
        require(self.clip in (None, "hessian", "mse"), "clip", 'None, "hessian" or "mse"')
        require(isinstance(self.damp, int | float) and 0 <= self.damp < 1, "damp", "in [0, 1)")
        require(self.experts in ("routed", "all"), "experts", '"routed" or "all"')
        require(self.activations in (None, "int8"), "activations", 'None or "int8"')
        require(isinstance(self.symmetric, bool), "symmetric", "true or false")
        require(isinstance(self.refit, bool), "refit", "true or false")
        require(self.objective in (None, "model", "layer"), "objective", 'None, "model" or "layer"')
        value = self.input_correction
        ok = value is None or (type(value) in (int, float) and 0 <= value <= 1)
        require(ok, "input_correction", "None or in [0, 1]")
        for name in ("descent", "scale_refit"):
            value = getattr(self, name)
            require(value is None or (type(value) is int and value >= 0), name, "None or an int >= 0")
        for name in ("dtype", "scale_dtype"):
            require(getattr(self, name) in (None, *DTYPES), name, f"one of {', '.join(DTYPES)}")
        self._validate_method()
        for pattern in (*self.targets, *self.ignore, *(pattern for pattern, _ in self.overrides)):
            _compile(pattern)
        for pattern, changes in self.overrides:
            self._override(pattern, changes)

    def _validate_method(self) -> None:
        if self.method in QUANTIZERS and self.bits is None:
            raise ValueError(f"recipe: {self.method} needs bits, e.g. {self.method}-int4-g128")
        if self.method in PRUNERS and self.sparsity is None:
            raise ValueError(f"recipe: {self.method} needs a sparsity, e.g. {self.method}-2:4")
        if self.sparsity is not None and self.method not in (*PRUNERS, "pack"):
            raise ValueError(f"recipe: {self.method} does not prune; for sparsity use {', '.join(PRUNERS)}")
        if self.bits is not None and self.method in ("cast", "pack"):
            raise ValueError(f"recipe: {self.method} does not quantize; for bits use {', '.join(QUANTIZERS)}")
        if self.method == "cast" and self.dtype is None:
            raise ValueError("recipe: cast needs a dtype, e.g. bf16")
        if self.activations and (self.method not in QUANTIZERS or self.bits not in (4, 8)):
            raise ValueError("recipe: int8 activations need 4- or 8-bit weights of rtn or gptq")
        if self.objective == "model":
            if self.method not in ("gptq", "sparsegpt"):
                raise ValueError(f'recipe: objective="model" is for gptq and sparsegpt, got {self.method}')
            if self.act_order == "dynamic" or not self.refit:
                raise ValueError('recipe: objective="model" goes with neither act_order="dynamic" nor refit=False')
        if self.input_correction and self.method not in ("gptq", "sparsegpt"):
            raise ValueError(f"recipe: input_correction is for gptq and sparsegpt, got {self.method}")
        for name in ("descent", "scale_refit"):
            if getattr(self, name) is not None and not (self.solves_columns and self.bits and self.refit):
                codes = "the codes of gptq, wanda, or sparsegpt with refit=True"
                raise ValueError(f"recipe: {name} is for {codes}, got {self!s} with refit={self.refit}")
        if not self.symmetric and self.sparsity is not None:
            raise ValueError("recipe: sparse weights are symmetric: a pruned weight is code 0")

    @classmethod
    def parse(cls, text: str | Recipe, **changes: Any) -> Recipe:
        """A recipe from its short form, such as "gptq-int4-g128"; `changes` set further fields.

        Raises ValueError for a form that is none.
        """
        if isinstance(text, Recipe):
            return replace(text, **changes) if changes else text
        if not isinstance(text, str):
            raise TypeError(f"recipe: wanted a Recipe or a short form, got {type(text).__name__}")
        return cls(**{**_parse(text), **changes})

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file: the fields of this class, and `recipe:` for a short form to start from.

        Raises FileNotFoundError without the file, ImportError without PyYAML, and ValueError for a file that is no
        mapping, an unknown key (with a suggestion) or a bad value.
        """
        try:
            import yaml
        except ImportError:
            raise ImportError(f"recipe {path}: recipe files need PyYAML: pip install 'llmkern[hf]'") from None

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"recipe {path}: no such file") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except yaml.YAMLError as error:
            raise ValueError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise ValueError(f"recipe {path}: wanted a mapping of fields, got {type(data).__name__}")
        overrides = data.get("overrides")
        for fields_ in (data, *(overrides.values() if isinstance(overrides, dict) else ())):
            if isinstance(fields_, dict) and type(fields_.get("sparsity")) is int:
                # YAML reads a bare 2:4 as a number of base 60.
                fields_["sparsity"] = f"{fields_['sparsity'] // 60}:{fields_['sparsity'] % 60}"
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; `recipe` may hold a short form to start from."""
        _refuse_unknown(data, (*(f.name for f in fields(cls)), "recipe"))
        values = {key: value for key, value in data.items() if key != "recipe"}
        if "recipe" in data:
            return cls.parse(data["recipe"], **values)
        if "method" not in values:
            raise ValueError("recipe: wanted a method, or recipe: with a short form")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, with lists and a mapping instead of tuples, as JSON and YAML have them."""
        data = asdict(self)
        data["targets"], data["ignore"] = list(self.targets), list(self.ignore)
        data["overrides"] = {pattern: _plain(changes) for pattern, changes in self.overrides}
        return data

    def __str__(self) -> str:
        """The short form; options that it has no word for are left out (see `to_dict`)."""
        if self.method == "cast":
            return next((short for short, dtype in CASTS.items() if dtype == self.dtype), f"cast to {self.dtype}")
        if self.activations and self.method == "rtn" and self.bits == 8 and not self.group_size and self.symmetric:
            return "w8a8"
        parts = [
            self.method,
            "" if self.sparsity is None else str(self.sparsity),
            f"int{self.bits}" if self.bits else "",
            f"g{self.group_size}" if self.group_size else "",
            "" if self.symmetric else "asym",
            "a8" if self.activations else "",
        ]
        return "-".join(part for part in parts if part)

    @property
    def needs_calibration(self) -> bool:
        """Whether this recipe, or any override of it, learns from data."""
        recipes = [self, *(self._override(pattern, changes) for pattern, changes in self.overrides)]
        return any(recipe is not None and recipe.method not in DATA_FREE for recipe in recipes)

    @property
    def by_model(self) -> bool:
        """Whether errors are measured by what they do to the model's outputs."""
        if self.objective is not None or self.method not in ("gptq", "sparsegpt"):
            return self.objective == "model"
        return self.act_order != "dynamic" and self.refit

    @property
    def correction(self) -> float:
        """How much of the errors in its input a layer makes up for."""
        if self.input_correction is not None or self.method not in ("gptq", "sparsegpt"):
            return self.input_correction or 0.0
        return CORRECTION if self.act_order != "dynamic" and self.refit else 0.0

    @property
    def orders_columns(self) -> bool:
        """Whether the solver takes the columns in the order of their activations, groups found beforehand."""
        return self.solves_columns and self.method != "sparsegpt" and self.act_order == "static"

    @property
    def solves_columns(self) -> bool:
        """Whether a solver goes through the columns with feedback of their errors."""
        return self.method in ("gptq", "sparsegpt") or (self.method == "wanda" and self.bits is not None)

    def assign(
        self, names: Iterable[str], head: str | None = None, aliases: Mapping[str, Iterable[str]] = MappingProxyType({})
    ) -> tuple[dict[str, Recipe], dict[str, str]]:
        """Which recipe each of the layers gets, and why the others get none (name -> reason).

        `head` is the name of the output head; `aliases` are other names of layers, which patterns match as well.
        Raises ValueError when a pattern matches nothing, when a target's
        layers are all ignored, or when two overrides match one layer.
        """
        names = list(names)

        def matches(pattern: str) -> set[str]:
            test = _compile(pattern)
            return {
                name
                for name in names
                if any(map(test, (name, *aliases.get(name, ())))) or (pattern == "lm_head" and name == head)
            }

        for kind in ("targets", "ignore", "overrides"):
            for entry in getattr(self, kind):
                pattern = entry[0] if kind == "overrides" else entry
                if not matches(pattern) and not (kind == "ignore" and pattern in DEFAULT_IGNORE):
                    raise ValueError(f"recipe: {kind} {pattern!r} matches no linear layer{_suggest(pattern, names)}")
        ignored = {name: pattern for pattern in self.ignore for name in matches(pattern)}
        for pattern in self.targets:
            if matches(pattern) <= ignored.keys():
                raise ValueError(
                    f"recipe: all that targets {pattern!r} matches is ignored; pass ignore=() to include it"
                )
        wanted = set(names) if not self.targets else {name for pattern in self.targets for name in matches(pattern)}
        special: dict[str, tuple[str, Any]] = {}
        for pattern, changes in self.overrides:
            for name in matches(pattern):
                if name in special:
                    raise ValueError(f"recipe: overrides {special[name][0]!r} and {pattern!r} both match {name}")
                special[name] = (pattern, changes)
        chosen: dict[str, Recipe] = {}
        skipped: dict[str, str] = {}
        plain = replace(self, targets=(), ignore=(), overrides=())
        for name in names:
            if name in ignored:
                skipped[name] = f"ignored by {ignored[name]!r}"
            elif name not in wanted:
                skipped[name] = "not among the targets"
            elif name not in special:
                chosen[name] = plain
            elif (changed := self._override(*special[name])) is not None:
                chosen[name] = changed
            else:
                skipped[name] = f"left as it is by override {special[name][0]!r}"
        return chosen, skipped

    def _override(self, pattern: str, changes: Any) -> Recipe | None:
        if changes is None:
            return None
        plain: dict[str, Any] = {"targets": (), "ignore": (), "overrides": (), "experts": self.experts}
        if isinstance(changes, str | Recipe):
            return Recipe.parse(changes, **plain)
        if not isinstance(changes, Mapping):
            raise ValueError(f"recipe: override {pattern!r} must be a mapping, a short form or null, got {changes!r}")
        _refuse_unknown(changes, tuple(f.name for f in fields(self) if f.name not in plain))
        return replace(self, **plain, **changes)


def _plain(changes: Any) -> Any:
    return (
        changes.to_dict() if isinstance(changes, Recipe) else dict(changes) if isinstance(changes, Mapping) else changes
    )


def _is_sparsity(value: Any) -> bool:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+):(\d+)", value)
        return match is not None and 0 < int(match[1]) < int(match[2])
    return isinstance(value, float) and 0 < value < 1


def _parse(text: str) -> dict[str, Any]:
    if text in CASTS:
        return {"method": "cast", "dtype": CASTS[text]}
    head, *words = text.split("-")
    if head == "w8a8":
        head, words = "rtn", ["w8a8", *words]
    found: dict[str, Any] = {"method": head}
    for word in words:
        for key, value in _word(word).items():
            if key in found:
                raise ValueError(f"recipe: {text!r} sets {key} twice")
            found[key] = value
    if head not in METHODS or head == "cast" or (words and not all(_word(word) for word in words)):
        raise ValueError(f"recipe: unknown short form {text!r}; known: {SHORT_FORMS}")
    if head == "pack" and "sparsity" not in found and words:
        raise ValueError(f"recipe: unknown short form {text!r}; known: {SHORT_FORMS}")
    return found


def _word(word: str) -> dict[str, Any]:
    """The fields that one dash-separated word of a short form sets; empty if it is none."""
    if match := re.fullmatch(r"int(\d+)", word):
        return {"bits": int(match[1])}
    if match := re.fullmatch(r"g(\d+)", word):
        return {"group_size": int(match[1])}
    if re.fullmatch(r"\d+:\d+", word):
        return {"sparsity": word}
    if re.fullmatch(r"\d*\.\d+", word):
        return {"sparsity": float(word)}
    words: dict[str, dict[str, Any]] = {
        "asym": {"symmetric": False},
        "a8": {"activations": "int8"},
        "w8a8": {"bits": 8, "activations": "int8"},
    }
    return words.get(word, {})


def _compile(pattern: Any) -> Any:
    """A test of a layer's name; ValueError for a pattern that is none."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"recipe: a pattern must be a name or 're:...', got {pattern!r}")
    if not pattern.startswith("re:"):
        return lambda name: name == pattern or name.endswith("." + pattern)
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"recipe: a pattern may have {MAX_PATTERN} characters, got {len(pattern)}")
    try:
        return re.compile(pattern[3:]).match
    except re.error as error:
        raise ValueError(f"recipe: bad pattern {pattern!r}: {error}") from None


def _refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise ValueError(f"recipe: unknown key {key!r}{hint}")


def _suggest(pattern: str, names: list[str]) -> str:
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
    close = difflib.get_close_matches(pattern, [*last_parts, *names], 1)
    return f"; did you mean {close[0]!r}?" if close else f"; layers end in {', '.join(last_parts) or 'nothing'}"
