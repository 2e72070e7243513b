"""GGUF files as dense models, through transformers' own reader; what that passes over in silence is refused here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern import gguf_header

ENDING = ".gguf"
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
# Of Llama 3.1 and later (meta-llama's config.json); the factor is the file's own.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_FACTORS = "rope_freqs.weight"


def find(name: str | Path) -> Path | None:
    """The GGUF file that a MODEL is: itself, or the only one of a folder without config.json. None if it is no such.

    Raises FileNotFoundError for a file that is not there, ValueError for a folder with several.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ENDING:
        if not path.is_file():
            raise FileNotFoundError(f"model {str(name)!r}: no such file")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob(f"*{ENDING}"))
    if len(found) > 1:
        raise ValueError(f"model {str(name)!r}: {len(found)} GGUF files there; name one of them, as {found[0]}")
    return found[0] if found else None


def read(path: Path) -> gguf_header.Header:
    """The checked header of a whole model. ValueError for a broken file, or one part of several."""
    header = gguf_header.read(path)
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise ValueError(f"{path}: one part of {parts}; merge them first (llama.cpp's gguf-split --merge)")
    return header


def dtype_of(header: gguf_header.Header) -> torch.dtype:
    """F16 or BF16 if every matrix has it, else fp32: dequantized values are fp32."""
    kinds = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return HALVES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def config(header: gguf_header.Header) -> Any:
    """The transformers config. ValueError for an architecture that transformers does not read."""
    _need_gguf()
    from transformers import AutoConfig

    path = header.path
    with _explained(path):
        found = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if ROPE_FACTORS in header.tensors:
        found.rope_parameters = {**(found.rope_parameters or {}), **_llama3(header, found)}
    return found


def load(path: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model of a file, dequantized to `dtype` (None: `dtype_of`), in eval mode, on the CPU.

    Raises ValueError for a broken file, an architecture transformers does not know, a tensor that the model lacks, has
    in another shape, or has no place for; ImportError without the package gguf.
    """
    header = read(path)
    dtype = dtype or dtype_of(header)
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # from 5.24 on it may keep a quantized weight in its blocks
        options["quantization_config"] = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    read_model: Any = transformers.AutoModelForCausalLM.from_pretrained
    with read_once():
        made = config(header)
        with _explained(path):
            model, info = read_model(
                path.parent, gguf_file=path.name, config=made, dtype=dtype, output_loading_info=True, **options
            )
            left = [*_without_place(model, header), *sorted(info["unexpected_keys"])]
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path}: no tensor for {len(missing)} parameters of {type(model).__name__}, as {missing[0]}")
    if left := [name for name in left if name != ROPE_FACTORS]:
        raise ValueError(f"{path}: {type(model).__name__} has no place for {len(left)} tensors, as {left[0]}")
    _forget_quantization(model)
    return model.eval()


def tokenizer(path: Path) -> Any:
    """The tokenizer of a file."""
    _need_gguf()
    from transformers import AutoTokenizer

    with _explained(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _need_gguf() -> None:
    from llmkern.models import need_module

    need_module("gguf", "reading a GGUF file")
    need_module("accelerate", "reading a GGUF file")


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, the package gguf goes through a file once, and makes its table of names once.

    transformers asks for the former for the configuration, the tokenizer and the model (each time for the pieces of
    every word), and its older reader for the latter for every module of the model: most of a load's time.
    """
    _need_gguf()
    import gguf

    whole = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, make in whole.items():
        setattr(gguf, name, cache(make))
    try:
        yield
    finally:
        for name, make in whole.items():
            setattr(gguf, name, make)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """transformers trusts a file's metadata, so that anything may be raised inside: one line that names the file."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: transformers cannot read this model: {kind}{lines[0]}") from error


def _without_place(model: Any, header: gguf_header.Header) -> list[str]:
    """Tensors that transformers' older reader skips; its newer one reports them itself."""
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
    except ImportError:
        pass
    else:
        if is_gguf_arch_supported(header.architecture):
            return []
    from transformers import modeling_gguf_pytorch_utils as reader

    kind = reader.TENSOR_PROCESSORS.get(header.architecture, reader.TensorProcessor)
    known = reader.get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    # Of a mixture's stacked experts a reader may know the name without its ending.
    return [name for name in header.tensors if name not in known and name.rpartition(".")[0] not in known]


def _llama3(header: gguf_header.Header, found: Any) -> dict[str, Any]:
    """The scaling of rotary frequencies that a file only tells by its factors, one per frequency.

    llama.cpp divides each frequency by its factor; transformers' reader drops them. They must be those of Llama 3.1
    and later, whatever the greatest factor; anything else is refused, as it would change every output.
    """
    tensor = header.tensors[ROPE_FACTORS]
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        stored = bytearray(file.read(tensor.nbytes))
    factors = torch.frombuffer(stored, dtype=torch.float32) if tensor.type == "F32" else torch.empty(0)
    theta = (found.rope_parameters or {}).get("rope_theta") or getattr(found, "rope_theta", None)
    if theta and factors.numel() and factors.isfinite().all():
        scaled = {"rope_type": "llama3", "rope_theta": theta, "factor": round(float(factors.max()), 3), **LLAMA3}
        wanted = _factors(factors.numel(), scaled)
        if torch.allclose(factors, wanted, rtol=1e-3):
            return scaled
    raise ValueError(f"{header.path}: {ROPE_FACTORS} are not the factors of Llama 3, and no others are known")


def _factors(count: int, scaled: dict[str, Any]) -> Tensor:
    """transformers' `_compute_llama3_parameters`, as what it divides the frequency of each pair of dimensions by."""
    turns = scaled["original_max_position_embeddings"] / (2 * math.pi)
    turns = turns / float(scaled["rope_theta"]) ** (torch.arange(count, dtype=torch.float64) / count)
    low, high, factor = scaled["low_freq_factor"], scaled["high_freq_factor"], scaled["factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def _forget_quantization(model: Any) -> None:
    """The weights are plain now; what is left of the file's own quantization would make the saved model unloadable."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for marker in ("hf_quantizer", "quantization_method", "is_quantized"):
        if marker in vars(model):
            delattr(model, marker)
