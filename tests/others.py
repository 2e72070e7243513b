"""Checkpoints as others write them, from the definitions of their layouts, with the values of Int4Weight layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmkern.formats import Int4Weight
from llmkern.nn import PackedLinear

GROUP = 16
CONFIGS = {
    "gptq": {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
}


def words_of(fields: torch.Tensor) -> torch.Tensor:
    """int64 [..., 8] nibbles, the lowest first -> int32 [...]."""
    words = sum(fields[..., at] << 4 * at for at in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def gptq(packed: Int4Weight, order: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """AutoGPTQ's v1. order: column j of the file is column order[j] of ours; its group goes with it."""
    n, k = packed.shape
    order = torch.arange(k) if order is None else order
    codes = packed.codes()[:, order].to(torch.int64) + 8
    return {
        "qweight": words_of(codes.T.reshape(k // 8, 8, n).transpose(1, 2)),
        "qzeros": torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32),
        "scales": packed.scales.T.to(torch.float16).contiguous(),
        "g_idx": (order // GROUP).to(torch.int32),
    }


def awq(packed: Int4Weight) -> dict[str, torch.Tensor]:
    """AutoAWQ's GEMM."""
    n, k = packed.shape
    eights = (packed.codes().T.to(torch.int64) + 8).view(k, n // 8, 8)
    return {
        "qweight": words_of(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]]),
        "qzeros": words_of(torch.full((k // GROUP, n // 8, 8), 8)),
        "scales": packed.scales.T.to(torch.float16).contiguous(),
    }


def tensors_of(model, method: str, orders: dict[int, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a model whose packed layers are Int4Weight, by the names of the files."""
    found = {}
    packed = {name: layer.packed for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    for name, weight in packed.items():
        order = orders[weight.shape[1]] if orders else None
        own = gptq(weight, order) if method == "gptq" else awq(weight)
        found |= {f"{name}.{leaf}": tensor for leaf, tensor in own.items()}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in packed:
            found[name] = tensor
    return found


def write(folder: Path, model, method: str, orders: dict[int, torch.Tensor] | None = None, **changes) -> Path:
    """A folder of gptq or awq weights."""
    folder.mkdir()
    own = {"quant_method": method, **CONFIGS[method], "desc_act": orders is not None, **changes}
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "quantization_config": own}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(model, method, orders), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
