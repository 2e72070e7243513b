"""The tensors of `Experts` in a file: by expert while one of them is packed into codes, else in the model's own layout.

by expert                                 the model's own (3-D), which every reader of the model knows
<home>.3.gate_up_proj.weight   [N, K]     <home>.gate_up_proj        [E, N, K], or [E, K, N] where it is transposed
<home>.3.gate_up_proj.bias     [N]        <home>.gate_up_proj_bias   [E, N]
<home>.gating.<name>                      <home>.<name>
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmkern.experts import Experts
from llmkern.weight_writer import Later


def fuse(tensors: dict[str, Tensor | Later], mixtures: Mapping[str, Experts]) -> list[str]:
    """Bring the mixtures (name -> module) into the model's own layout where plain weights of one dtype are all there
    is; the names of the others, which stay as they are.
    """
    left = []
    for home, mixture in mixtures.items():
        parts = parts_of(home, mixture)
        if not all(name in tensors for names in parts.values() for name in names) or any(
            # Codes stored as plain int8 have their scales beside them.
            len({tensors[name].dtype for name in names}) > 1 or not tensors[names[0]].dtype.is_floating_point
            for names in parts.values()
        ):
            left.append(home)
            continue
        for whole, names in parts.items():
            own = [tensors.pop(name) for name in names]
            tensors[whole] = _stacked(own, mixture.transposed)
        for name in [name for name in tensors if name.startswith(f"{home}.gating.")]:
            tensors[f"{home}.{name.removeprefix(f'{home}.gating.')}"] = tensors.pop(name)
    return left


def _stacked(parts: list[Tensor | Later], transposed: bool) -> Later:
    """The parts as one tensor, made when it is written."""
    turned = transposed and len(parts[0].shape) == 2
    shape = torch.Size((len(parts), *(parts[0].shape[::-1] if turned else parts[0].shape)))

    def make() -> Tensor:
        made = [part if isinstance(part, Tensor) else part.make() for part in parts]
        return torch.stack([tensor.T if turned else tensor for tensor in made])

    return Later(parts[0].dtype, shape, make)


def split(tensors: dict[str, Tensor], mixtures: Mapping[str, Experts]) -> None:
    """The inverse of `fuse`, for the mixtures that are in the model's own layout. ValueError for a wrong shape."""
    for home, mixture in mixtures.items():
        parts = parts_of(home, mixture)
        if not all(whole in tensors for whole in parts):
            continue
        for whole, names in parts.items():
            stack = tensors.pop(whole)
            if stack.ndim < 2 or len(stack) != len(names):
                raise ValueError(f"load: {whole} must hold {len(names)} experts, got {list(stack.shape)}")
            for name, part in zip(names, stack, strict=True):
                tensors[name] = (part.T if mixture.transposed and part.ndim == 2 else part).contiguous()
        for name in mixture.gating.state_dict():
            if f"{home}.{name}" in tensors:
                tensors[f"{home}.gating.{name}"] = tensors.pop(f"{home}.{name}")


def parts_of(home: str, mixture: Experts) -> dict[str, list[str]]:
    """Tensor of the model's own layout -> the names of its parts, expert after expert."""
    return {
        f"{home}.{projection}{suffix}": [f"{home}.{at}.{projection}.{part}" for at in range(mixture.num_experts)]
        for projection, layer in mixture.projections(0).items()
        for suffix, part in (("", "weight"), *((("_bias", "bias"),) if layer.bias is not None else ()))
    }
