"""save_pretrained of a model with packed layers: what llmkern.save writes, among the files that are there already."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from llmkern.checkpoint import EXTRA, META, save
from llmkern.experts import Experts
from llmkern.nn import PackedLinear

# Keywords that llmkern.save has no counterpart of, with the values that ask for nothing.
REFUSED = {
    "state_dict": (None, "the packed layers are written from the model itself"),
    "push_to_hub": (False, "save into a folder and upload that (huggingface_hub.upload_folder)"),
    "variant": (None, "the files have the names that readers of the format look for"),
    "distributed_checkpoint": (False, "packed layers are no distributed tensors"),
}


def holds_packed(model: nn.Module) -> bool:
    """Whether transformers alone would not write what it could read again."""
    return any(isinstance(module, PackedLinear | Experts) for module in model.modules())


def save_pretrained(stock: Callable[..., Any], model: Any, directory: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Write `model` into `directory`; files of other names stay. `stock`: transformers' own method.

    Only adapters are written where a model has some, as transformers does. ValueError for keywords that ask for what
    is not there, and what llmkern.save raises.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return stock(model, directory, *args, **kwargs)
    asked = inspect.signature(stock).bind(model, directory, *args, **kwargs)
    for key, (nothing, reason) in REFUSED.items():
        if asked.arguments.get(key, nothing) not in (nothing, None):
            raise ValueError(f"save_pretrained: {key} does not go with llmkern's packed layers: {reason}")
    if not asked.arguments.get("is_main_process", True):
        return None
    folder = Path(directory)
    if folder.is_file():
        raise ValueError(f"save_pretrained: {folder} is a file, wanted a folder")
    folder.mkdir(parents=True, exist_ok=True)
    origin = getattr(getattr(model, "hf_quantizer", None), "format", "compressed-tensors")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.resolve().parent) as beside:
        size = asked.arguments.get("max_shard_size", "5GB")
        new = save(model, Path(beside, "new"), origin, max_shard_size=size)
        for old in _old(folder):
            old.unlink()
        # llmkern.json last: without it, half of the files are not taken for a folder of ours.
        for file in sorted(new.iterdir(), key=lambda file: file.name == META):
            os.replace(file, folder / file.name)
    return None


def _old(folder: Path) -> list[Path]:
    """The weights of an earlier save, and what describes them; llmkern.json first."""
    names = [
        folder / META,
        folder / EXTRA,
        *sorted(folder.glob("model*.safetensors")),
        folder / "model.safetensors.index.json",
    ]
    return [path for path in names if path.is_file()]
