"""verify: every tensor of a checkpoint looked at, all that is wrong with it listed, and one pass of the model if asked.

What loading believes is checked in the same way, and what it never looks at as well: checksums, and values of tensors
that are in no packed layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import checkpoint, checkpoints, expert_files, gguf_models, loading
from llmkern._json import read_object
from llmkern._registry import force
from llmkern.checkpoints.folder import Folder, names_quantization
from llmkern.checkpoints.scheme import BadTensor
from llmkern.formats import compressed_tensors as ct
from llmkern.formats import gptq_checkpoint
from llmkern.nn import ORDER, PackedLinear
from llmkern.weight_files import DTYPES, Files, Lazy

TOKENS = 16  # of the pass
# Of the greatest output, by the model's dtype: what sums in another order, and rounded inputs of later layers, make.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
QUANTIZED = 5e-2  # where activations are int8: a value next to a boundary rounds to the other side
PART = 1 << 22  # values of a GGUF tensor that are dequantized at a time


def verify(path: str | Path, *, forward: bool = False) -> dict[str, Any]:
    """What was checked and what is wrong: {"kind", "checks": {name: count}, "problems": [text], "forward": ...}.

    path: a folder of llmkern.save, one of compressed-tensors, GPTQ or AWQ weights, a dense one, or a GGUF file.
    forward: run TOKENS tokens through the model, and once more with the reference of every op.

    Raises FileNotFoundError and ValueError where there is no checkpoint to look at; what is wrong with one is listed.
    """
    path = Path(path).expanduser()
    if (gguf := gguf_models.find(path)) is not None:
        kind, steps = "gguf", [_gguf_values(gguf), _loads(lambda: gguf_models.load(gguf))]
    elif not path.is_dir():
        raise FileNotFoundError(f"verify: {path}: no such folder or GGUF file")
    elif (path / checkpoint.META).is_file():
        kind, steps = "llmkern", [_sums(path), _values(path), _own_layers(path), _loads(lambda: loading.load(path))]
    elif not (path / "config.json").is_file():
        raise FileNotFoundError(f"verify: {path}: no config.json there, so not a model folder")
    elif names_quantization(path):
        kind, steps = "foreign", [_values(path), _foreign_layers(path), _loads(lambda: loading.load(path))]
    else:
        kind, steps = "dense", [_values(path), _loads(lambda: _dense(path))]
    checks: dict[str, int] = {}
    problems: list[str] = []
    model = None
    for step in steps:
        model = _run(step, checks, problems) or model
    result: dict[str, Any] = {"kind": kind, "checks": checks, "problems": problems, "forward": None}
    if forward and model is not None and not problems:
        result["forward"], wrong = _forward(model)
        problems += wrong
    return result


# A step yields what it checked, as (name of the check, the problem or None, or the loaded model).
Step = Iterator[tuple[str, str | nn.Module | None]]


def _run(step: Step, checks: dict[str, int], problems: list[str]) -> Any:
    """Count what the step checks and note what is wrong; the model, if it loads one. An error ends the step."""
    model = None
    try:
        for name, found in step:
            checks[name] = checks.get(name, 0) + 1
            if isinstance(found, str):
                problems.append(found)
            elif found is not None:
                model = found
    except (ValueError, TypeError, OSError) as error:
        if (text := str(error)) not in problems:
            problems.append(text)
    return model


def _sums(folder: Path) -> Step:
    """Files against the checksums of llmkern.json, if it has any."""
    if "sha256" in read_object(folder / checkpoint.META, "verify"):
        for _ in range(checkpoint.check_files(folder)):
            yield "checksums", None


def _values(folder: Path) -> Step:
    """Float tensors hold no NaN and no infinity. One tensor is in memory at a time."""
    found = sorted(folder.glob("*.safetensors"))
    standard = [file for file in found if file.name != checkpoint.EXTRA]
    single = standard if len(standard) == 1 else None
    for key, stored in Files(folder, "verify", single).tensors.items():
        if stored.dtype not in DTYPES:
            yield "tensors", f"verify: {stored.path}: tensor {key!r} is {stored.dtype}, which is not read"
            continue
        yield "tensors", _infinite(f"verify: {stored.path}: tensor {key!r}", Lazy(key, stored, "verify")[...])


def _infinite(where: str, values: Tensor) -> str | None:
    if not values.is_floating_point() or bool(torch.isfinite(values).all()):
        return None
    bad = ~torch.isfinite(values)
    at = [int(i) for i in bad.nonzero()[0]]
    return f"{where} holds {int(bad.sum())} values that are not finite, as {float(values[tuple(at)])} at {at}"


def _own_layers(folder: Path) -> Step:
    """Each packed layer of a folder of ours by itself: codes, scales, zero points, 2:4 as llmkern.json says."""
    meta = loading._read_meta(folder)
    if not meta["layers"]:
        return
    tensors, extra = Leaves(folder), Leaves(folder, checkpoint.EXTRA)
    for name, entry in meta["layers"].items():
        yield "layers", _own_layer(folder, name, entry, tensors, extra.of(name), meta["format"])


def _own_layer(
    folder: Path, name: str, entry: Any, tensors: Leaves, extra: dict[str, Tensor], format: str
) -> str | None:
    """What is wrong with a layer; nothing with an expert of a 3-D parameter, which only the model can part."""
    decode = gptq_checkpoint.decode if format == "gptq" else ct.decode
    extra.pop(ORDER, None)
    try:
        kind, shape, group_size, _, record = loading._entry(name, entry)
        if "parts" in entry:
            parts = [tensors.of(part) for part in loading._names(name, entry["parts"])]
            own = expert_files.join(name, parts, format)
        else:
            own = tensors.of(name)
        own.pop("bias", None)
        if entry.get("conv1d") and "weight" in own and "weight_scale" not in own:
            own["weight"] = own["weight"].T.contiguous()
        if own:
            decode(kind, own, extra, shape=shape, group_size=group_size, bits=record["num_bits"])
    except (ValueError, TypeError) as error:
        return f"verify: {folder}: layer {name}: {error}"
    return None


class Leaves:
    """The tensors of a folder (or of one file of it) by layer; read when they are asked for."""

    def __init__(self, folder: Path, only: str | None = None) -> None:
        self.names: dict[str, dict[str, Any]] = {}
        if only is not None and not (folder / only).is_file():
            return
        for key, stored in Files(folder, "verify", None if only is None else [folder / only]).tensors.items():
            layer, _, leaf = key.rpartition(".")
            self.names.setdefault(layer, {})[leaf] = Lazy(key, stored, "verify")

    def of(self, layer: str) -> dict[str, Tensor]:
        """Leaf -> tensor."""
        return {leaf: lazy[...] for leaf, lazy in self.names.get(layer, {}).items()}


def _foreign_layers(folder: Path) -> Step:
    """Each layer of codes of a folder that others wrote, as the readers read it."""
    opened = Folder(folder)
    shapes = {layer.name: layer.shape for layer in checkpoints.describe(folder).layers}
    for name in opened.layers:
        yield "layers", _foreign_layer(opened, name, shapes[name])


def _foreign_layer(opened: Folder, name: str, shape: tuple[int, ...]) -> str | None:
    try:
        tensors = {leaf: opened.read(key) for leaf, key in opened.layers[name].items() if leaf != "bias"}
        checkpoints.read_layer(opened.scheme(name), tensors, (shape[0], shape[1]))
    except BadTensor as error:
        return str(opened.wrong(name, error))
    return None


def _gguf_values(path: Path) -> Step:
    """Every tensor dequantized: no value that is not finite."""
    from llmkern.models import need_module

    need_module("gguf", "reading a GGUF file")
    import gguf
    import numpy

    for name, tensor in gguf_models.read(path).tensors.items():
        kind, rows = gguf.GGMLQuantizationType[tensor.type], max(tensor.nbytes // tensor.block[1], 1)
        step = max(PART // tensor.block[0], 1)
        wrong = None
        for start in range(0, rows, step):
            count = min(step, rows - start) * tensor.block[1]
            raw = numpy.fromfile(path, numpy.uint8, count, offset=tensor.offset + start * tensor.block[1])
            try:
                values = gguf.dequantize(raw.reshape(1, -1), kind)
            except NotImplementedError:
                wrong = f"verify: {path}: tensor {name!r} is {tensor.type}, which the package gguf does not dequantize"
                break
            wrong = wrong or _infinite(f"verify: {path}: tensor {name!r}", torch.from_numpy(numpy.array(values)))
        yield "tensors", wrong


def _loads(load: Callable[[], Any]) -> Step:
    """The model takes the tensors: none is missing, unknown, or of another shape."""
    try:
        model = load()
    except (ValueError, TypeError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # transformers believes a config.json: anything may be raised inside
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(f"verify: the model cannot be built: {type(error).__name__}: {lines[0]}") from error
    yield "model", model


def _dense(folder: Path) -> Any:
    from llmkern.streaming import stream

    return stream(folder)


def _forward(model: Any) -> tuple[dict[str, Any], list[str]]:
    """One pass with the kernels of this machine and one with the references: (differences, what is wrong)."""
    model = model.eval()
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    ids = (torch.arange(TOKENS) % model.get_input_embeddings().num_embeddings)[None]
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        got = model(**inputs)[0].float()
        with force("reference"):
            wanted = model(**inputs)[0].float()
    greatest = float(wanted.abs().max())
    difference = float((got - wanted).abs().max())
    limit = TOLERANCE.get(model.dtype, QUANTIZED)
    if any(layer.activations for layer in packed):
        limit = max(limit, QUANTIZED)
    found = {"tokens": TOKENS, "layers": len(packed), "ops": sorted({layer.op for layer in packed}),
             "greatest": greatest, "difference": difference, "limit": limit * greatest}  # fmt: skip
    if not (torch.isfinite(got).all() and torch.isfinite(wanted).all()):
        return found, ["verify: the model's outputs are not finite"]
    if difference > limit * greatest:
        return found, [f"verify: kernels and references differ by {difference:.3g} in outputs of up to {greatest:.3g}"]
    return found, []
