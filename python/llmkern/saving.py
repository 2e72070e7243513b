"""save: a model with packed layers as a folder; `llmkern.checkpoint` says what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from llmkern._files import digest
from llmkern._version import __version__
from llmkern.checkpoint_folder import EXTRA, FORMAT_VERSION, FORMATS, META, refuse_foreign, seal, whole_folder
from llmkern.nn import PackedLinear
from llmkern.report import Report
from llmkern.saved_config import config_of, warn_of_readers
from llmkern.saved_layers import encode_model
from llmkern.shards import parse_size, write_shards
from llmkern.weight_writer import write

SPARSITY = "llmkern.sparsity"  # in the header of safetensors files, where no reader looks for what it does not know


def save(
    model: nn.Module, path: str | Path, format: str = "compressed-tensors", *,
    tokenizer: Any = None, report: Report | None = None, max_shard_size: int | str = "5GB",
) -> Path:  # fmt: skip
    """Write a transformers model to the folder `path`, which appears complete or not at all.

    format: "compressed-tensors"; "gptq" (v1, symmetric codes with float16 scales); "dense" (weights unpacked to the
    model's dtype). max_shard_size: bytes, or such as "5GB" or "200MiB", from which on the tensors are spread over
    several files. A folder at `path` is replaced if llmkern wrote it (it holds llmkern.json) or it is empty, refused
    otherwise. Raises FileExistsError for that, TypeError for a model without a transformers config, ValueError for
    what the format cannot hold, OSError where the disk is full; nothing is left behind then.
    """
    most = parse_size(max_shard_size)
    if format not in FORMATS:
        raise ValueError(f"save: format must be one of {', '.join(FORMATS)}, got {format!r}")
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_file"):
        raise TypeError(f"save: {type(model).__name__} has no transformers config; only transformers models are saved")
    path = Path(path)
    refuse_foreign(path)
    encoded = encode_model(model, format)
    model_config = config_of(model, encoded, format)
    warn_of_readers(encoded)
    sparsity = _sparsity(model)
    meta = {
        "format_version": FORMAT_VERSION,
        "llmkern": __version__,
        "format": format,
        "model_class": type(model).__name__,
        "recipe": report.details if report else None,
        "tied": encoded.tied,
        "renamed": encoded.renamed.others,
        "sparsity": sparsity,
        "layers": encoded.layers,
    }
    header = {"format": "pt", **({SPARSITY: sparsity} if sparsity else {})}
    with whole_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(model_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        sums = write_shards(folder, encoded.tensors, header, most)
        if encoded.extra:
            sums[EXTRA] = write(folder / EXTRA, encoded.extra, header)
        if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        meta["sha256"] = {name: sums[name].whole if name in sums else digest(folder / name) for name in files}
        meta["headers"] = {name: found.header for name, found in sums.items()}
        meta["seal"] = seal(meta)
        if report is not None:  # not among the checksums: it holds times, and two runs' models are the same without it
            report.to_json(folder / "report.json")
            report.to_html(folder / "report.html")
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return path


def _sparsity(model: nn.Module) -> str | None:
    """ "2:4" if layers of the model are."""
    layers = (module for module in model.modules() if isinstance(module, PackedLinear))
    return "2:4" if any(layer.format.startswith("Sparse24") for layer in layers) else None
