"""The two methods of PreTrainedModel that pass through here: from_pretrained and save_pretrained.

Only `from_pretrained` knows the folder, and only the folder says that llmkern wrote it: its config.json is one that
stock tools read (compressed-tensors, gptq, or plain dense weights). So the configuration that goes on names the method
"llmkern", which is registered with transformers by its own means; everything else is transformers' way of loading.
"""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from llmkern.hf import _settings

META = "llmkern.json"  # llmkern.checkpoint has it too, but importing that costs more than most programs need
# What concerns the files, and what `from_pretrained` itself takes though a configuration has it as well.
FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
LOADING = ("dtype", "torch_dtype", "quantization_config", "distributed_config", "attn_implementation",
           "experts_implementation", "name_or_path")  # fmt: skip


def install(module: ModuleType) -> None:
    """Wrap the methods of `module.PreTrainedModel`, once."""
    kind = module.PreTrainedModel
    load, save = kind.__dict__["from_pretrained"].__func__, kind.save_pretrained
    if getattr(save, "_llmkern", False):
        return

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not _settings.is_stock():
            kwargs = prepare(cls, pretrained_model_name_or_path, kwargs)
        return load(cls, pretrained_model_name_or_path, *args, **kwargs)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from llmkern.hf import _saving

        if _settings.is_stock() or not _saving.holds_packed(self):
            return save(self, save_directory, *args, **kwargs)
        return _saving.save_pretrained(save, self, save_directory, args, kwargs)

    if (implementations := getattr(module, "ALL_EXPERTS_FUNCTIONS", None)) is not None:  # not in the first 5.x
        implementations.register("llmkern", dense_experts)
    save_pretrained._llmkern = True  # type: ignore[attr-defined]
    kind.from_pretrained = classmethod(from_pretrained)
    kind.save_pretrained = save_pretrained


def dense_experts(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The experts implementation "llmkern" of transformers, for mixtures that are not packed: the class's own forward.

    Packed ones are `llmkern.experts.Experts`, which run on llmkern's kernels whatever implementation is set.
    """
    return type(self).forward.__wrapped__(self, *args, **kwargs)


def prepare(cls: Any, name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords for transformers' from_pretrained: with a configuration of ours where the checkpoint is for us."""
    if name is None or kwargs.get("gguf_file") is not None:
        return kwargs
    folder = Path(os.fspath(name), kwargs.get("subfolder") or "")
    own = (folder / META).is_file()
    if not own and not _settings.taken():
        return kwargs
    from llmkern.hf._quantizer import LoadConfig

    given, kwargs = kwargs, dict(kwargs)
    asked = kwargs.pop("quantization_config", None)
    config = _config(cls, name, kwargs)
    found = _quantization(config)
    method = found.get("quant_method") if found else None
    if not own and method not in _settings.taken():
        return given
    if asked is not None and not isinstance(asked, LoadConfig):
        raise ValueError(
            f"from_pretrained: {name} goes into llmkern's packed layers, which take a llmkern.hf.LoadConfig as "
            f"quantization_config, got {type(asked).__name__}; to read it with transformers alone: llmkern.hf.stock()"
        )
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    config.quantization_config = {
        "quant_method": LoadConfig.METHOD,
        "folder": str(folder) if own else None,
        "foreign": None if own else found,
        "dequantize": bool(asked and asked.dequantize),
        "as_stored": dtype in (None, "auto"),
    }
    return {**kwargs, "config": config}


def _config(cls: Any, name: Any, kwargs: dict[str, Any]) -> Any:
    """The configuration that from_pretrained would load, a copy; its fields are taken out of `kwargs`."""
    from transformers import PreTrainedConfig

    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        return copy.deepcopy(given)
    files = {key: kwargs[key] for key in FILES if key in kwargs}
    config = cls.config_class.from_pretrained(name if given is None else given, **files)
    for key in [key for key in kwargs if key not in FILES + LOADING and hasattr(config, key)]:
        setattr(config, key, kwargs.pop(key))
    return config


def _quantization(config: Any) -> dict[str, Any] | None:
    """The quantization_config of config.json, where transformers looks for it."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()
