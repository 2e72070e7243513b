"""A folder of dense safetensors as transformers would load it: names, dtypes, shapes, and one tensor at a time."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern._json import read_object, without_twins
from llmkern._memory import fill
from llmkern.weight_writer import NAMES

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that older checkpoints hold and newer models compute.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class Stored(NamedTuple):
    """One tensor as its file's header describes it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


class Target(NamedTuple):
    """The first tensor of the model that a tensor of the files becomes; `converted`: not one to one."""

    name: str
    converted: bool


class Lazy:
    """A tensor that is read when it is indexed, as transformers does with a slice of a safetensors file.

    Read, not mapped: a mapping's pages would count as this process's memory.
    """

    def __init__(self, key: str, stored: Stored, caller: str = "stream") -> None:
        self.key, self.stored, self.caller = key, stored, caller

    def __getitem__(self, at: Any) -> Tensor:
        tensor = torch.empty(self.stored.shape, dtype=DTYPES[self.stored.dtype])
        with self.stored.path.open("rb", buffering=0) as file:
            file.seek(self.stored.offset)
            if not fill(tensor, file):
                raise ValueError(f"{self.caller}: {self.stored.path}: the file ends inside tensor {self.key!r:.100}")
        return tensor[at]


class Files:
    """The safetensors of a folder: `tensors` by name. Headers only; nothing in a file is believed unchecked.

    Raises FileNotFoundError when there are none, ValueError for a broken file or index, or a tensor that is in two;
    errors begin with `caller`.
    """

    def __init__(self, folder: Path, caller: str = "stream", paths: list[Path] | None = None) -> None:
        """paths: the files, where they are others than those that transformers would read."""
        self.folder, self.caller = folder, caller
        self.tensors: dict[str, Stored] = {}
        for path in paths or weight_paths(folder, caller):
            for key, stored in headers(path, caller):
                if key in self.tensors:
                    raise ValueError(
                        f"{caller}: {path}: tensor {key!r:.100} is in {self.tensors[key].path.name} as well"
                    )
                self.tensors[key] = stored

    def dtype(self, config: Any) -> torch.dtype:
        """The dtype that the model has by default: its config's, else that of its first float tensor."""
        named = getattr(config, "dtype", None)
        if named is not None:
            return getattr(torch, named) if isinstance(named, str) else named
        return next((FLOATS[s.dtype] for s in self.tensors.values() if s.dtype in FLOATS), torch.float32)

    def check(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        """ValueError for a tensor of another shape than its parameter, or of no dense float dtype."""
        wanted = model.state_dict()
        for key, target in targets.items():
            stored, tensor = self.tensors[key], wanted[target.name]
            if stored.dtype not in (FLOATS if tensor.is_floating_point() else DTYPES):
                known = ", ".join(FLOATS if tensor.is_floating_point() else DTYPES)
                raise ValueError(
                    f"{self.caller}: {stored.path}: tensor {key!r:.100} must be one of {known}, got {stored.dtype}"
                )
            if not target.converted and stored.shape != tuple(tensor.shape):
                raise ValueError(
                    f"{self.caller}: {stored.path}: tensor {key!r:.100} must be {list(tensor.shape)} for "
                    f"{target.name}, got {list(stored.shape)}"
                )

    def warn_unknown(self, model: nn.Module, unknown: list[str]) -> None:
        """Say which tensors of the files the model does not have, but for those that it knows to leave out."""
        if left := without_place(model, unknown):
            kind = type(model).__name__
            warnings.warn(
                f"{self.caller}: {kind} has no place for {len(left)} tensors of {self.folder}, as {left[0]}",
                stacklevel=4,
            )


def without_place(model: nn.Module, unknown: list[str]) -> list[str]:
    """Of tensors that the model does not have, those that it does not know to leave out either."""
    known = [*COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return [key for key in unknown if not any(re.search(pattern, key) for pattern in known)]


class Reader:
    """Loads tensors of the files into a model by transformers' own rules for names, merged tensors, and dtypes."""

    def __init__(self, model: Any, files: Files) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
            from transformers.modeling_utils import LoadStateDictConfig
        except ImportError as error:
            import transformers

            raise ImportError(
                f"{files.caller}: transformers {transformers.__version__} loads weights in a way this llmkern does not "
                f"know ({error}); load the whole model instead"
            ) from None
        mapping = get_model_conversion_mapping(model)
        self.files = files
        self.renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        dtype = model.dtype
        plan = model._get_dtype_plan(dtype)
        self.config = LoadStateDictConfig(dtype=dtype, dtype_plan=plan, weight_mapping=mapping)  # type: ignore[arg-type]

    def targets(self, model: Any) -> tuple[dict[str, Target], list[str]]:
        """What each tensor of the files becomes, and the tensors that become nothing."""
        wanted = model.state_dict()
        targets, unknown = {}, []
        for key in self.files.tensors:
            name, pattern = self.rename(model, key, wanted)
            if name in wanted:
                targets[key] = Target(name, pattern is not None)
            else:
                unknown.append(key)
        return targets, unknown

    def rename(self, model: Any, key: str, wanted: Mapping[str, Tensor]) -> tuple[str, str | None]:
        """A tensor's name in the model whose state dict is `wanted`, and the pattern of the converter that makes it
        (None: it is taken as it is).
        """
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(
            key,
            self.renamings,
            self.converters,
            model.base_model_prefix,
            wanted,  # type: ignore[arg-type]
        )
        return (key, None) if name not in wanted and key in wanted else (name, pattern)

    def load(self, model: Any, keys: list[str]) -> None:
        """Read these tensors into their parameters. ValueError when one does not fit or cannot be converted."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        caller = self.files.caller
        lazy = {key: Lazy(key, self.files.tensors[key], caller) for key in keys}
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(model, lazy, self.config)
        if info.mismatched_keys:
            name, got, wanted = sorted(info.mismatched_keys)[0]
            raise ValueError(f"{caller}: {self.files.folder}: {name} must be {list(wanted)}, got {list(got)}")
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise ValueError(f"{caller}: {self.files.folder}: {name}: {' '.join(str(error).split())}")


def read_config(folder: Path) -> Any:
    """The config of a local folder. ValueError when its weights are quantized: they are not dense."""
    from llmkern.models import need_transformers

    need_transformers()
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"stream: {folder} holds no config.json, so it is no model folder")
    config = AutoConfig.from_pretrained(folder)
    refuse_quantized(config, folder)
    return config


def refuse_quantized(config: Any, name: object) -> None:
    """ValueError for the config of a quantized checkpoint."""
    if (found := getattr(config, "quantization_config", None)) is not None:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise ValueError(f"{name}: its weights are quantized already ({method}); wanted a dense checkpoint")


def skeleton(config: Any, dtype: Any, folder: Path | None = None) -> Any:
    """The model of a config with parameters on the meta device, in `dtype`; its buffers are computed."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if folder is not None and model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside hold meta parameters: no memory, no random initialisation; buffers are real.

    `torch.device("meta")` would also swallow the buffers that no file holds (rotary frequencies).
    """
    register, reset = nn.Module.register_parameter, nn.Linear.reset_parameters

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        if parameter is not None:
            # Nothing to initialise, which would be most of the time here.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Linear.reset_parameters = reset  # type: ignore[method-assign]


def weight_paths(folder: Path, caller: str) -> list[Path]:
    """The files that transformers would read: the one file, else those of the index.

    Raises FileNotFoundError for one that is not there, ValueError for a broken index or one that leaves the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{caller}: {folder} holds neither {WEIGHTS} nor {INDEX}")
    names = read_object(folder / INDEX, caller).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{caller}: {folder / INDEX}: wanted JSON with a weight_map of file names")
    for name in (found := sorted(set(names.values()))):
        if Path(name).name != name:
            raise ValueError(f"{caller}: {folder / INDEX}: a file name with a folder in it: {name!r:.100}")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{caller}: {folder / INDEX}: wanted a .safetensors file, got {name!r:.100}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{caller}: {folder / INDEX} names {name}, which is not there")
    return [folder / name for name in found]


def headers(path: Path, caller: str) -> Iterator[tuple[str, Stored]]:
    """Each tensor of a safetensors file. ValueError for a file that is none, or has a name twice."""
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks the whole header: that offsets fit the file, the shapes, and one another.
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=without_twins)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{caller}: {path} cannot be read: {str(error).splitlines()[0]}") from None
    header.pop("__metadata__", None)
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        yield key, Stored(path, entry["dtype"], tuple(entry["shape"]), end - start, 8 + length + start)


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar for every load, and here a load is one block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
