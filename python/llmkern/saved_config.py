"""config.json of a folder that `save` writes: the model's own, with the quantization_config of the format."""

from __future__ import annotations

import json
import warnings
from typing import Any

from torch import nn

from llmkern.expert_files import PATTERN
from llmkern.formats import compressed_tensors as ct
from llmkern.formats import gptq_checkpoint
from llmkern.nn import PackedLinear, is_linear
from llmkern.saved_layers import Encoded, model_dtype

Groups = list[tuple[dict[str, Any] | None, str | None, list[str]]]


def config_of(model: nn.Module, encoded: Encoded, format: str) -> dict[str, Any]:
    """What config.json holds. Layers that it cannot describe come to `encoded.unread`."""
    config = _plain_config(model)
    head = _untied_head(model)
    if head and not encoded.tied and not config.get("is_encoder_decoder"):
        config["tie_word_embeddings"] = False
    elif head:  # the key also says what else is tied, or scales what T5's head gets
        encoded.unread[head] = "its weight was tied to the embeddings, as config.json still says"
    if (quantization := _quantization(model, encoded, format)) is not None:
        config["quantization_config"] = quantization
    return config


def warn_of_readers(encoded: Encoded) -> None:
    """Say which layers other readers cannot read, or not in the way they read a folder by default."""
    if encoded.unread:
        name, reason = next(iter(encoded.unread.items()))
        count = len(encoded.unread)
        warnings.warn(
            f"save: llmkern.load reads this folder, other readers cannot: {count} layers, as {name}: {reason}",
            stacklevel=3,
        )
        return
    uneven = [name for name, scheme, _ in encoded.schemes if scheme and scheme.get("symmetric") is False]
    if uneven:
        warnings.warn(
            f"save: {len(uneven)} layers have zero points, as {uneven[0]}: transformers reads them only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True), and its default fails; symmetric codes "
            "load everywhere",
            stacklevel=3,
        )


def _quantization(model: nn.Module, encoded: Encoded, format: str) -> dict[str, Any] | None:
    """The quantization_config; None if every reader of dense models can read this one."""
    if not encoded.schemes:
        return None
    if format == "gptq":
        return gptq_checkpoint.quantization_config([scheme for _, scheme, _ in encoded.schemes if scheme])
    coded = {name for name, _, _ in encoded.schemes}
    ignore = [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or isinstance(module, PackedLinear)) and name not in coded
    ]
    # Routers, which some readers hold as linear layers.
    ignore += [name.removesuffix(".weight") for name in encoded.renamed.others if name.endswith(".gate.weight")]
    return ct.quantization_config(_groups(encoded), ignore, standard=encoded.standard)


def _groups(encoded: Encoded) -> Groups:
    """(scheme, activations, targets) of each scheme; experts under other names are targets by a pattern."""
    groups: dict[str, tuple[dict[str, Any] | None, str | None, list[str]]] = {}
    for name, scheme, activations in encoded.schemes:
        targets = groups.setdefault(json.dumps([scheme, activations]), (scheme, activations, []))[2]
        target = PATTERN if name in encoded.renamed.parts else name
        if target not in targets[-1:]:
            targets.append(target)
    return list(groups.values())


def _plain_config(model: nn.Module) -> dict[str, Any]:
    """The model's config.json."""
    config = json.loads(model.config.to_json_string(use_diff=True))  # type: ignore[union-attr, operator]
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model_dtype(model)).removeprefix("torch.")
    config.pop("quantization_config", None)
    return config


def _untied_head(model: nn.Module) -> str | None:
    """The packed output head of a model whose configuration says that it shares the weight of the embeddings."""
    tied = getattr(model.config, "tie_word_embeddings", False)  # no key in the file where it is the class's default
    head = model.get_output_embeddings() if tied else None  # type: ignore[operator]
    return next((name for name, m in model.named_modules() if m is head and isinstance(m, PackedLinear)), None)
