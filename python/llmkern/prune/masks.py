"""MaskSet: which weights of a model are pruned, and that they stay so while it is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmkern._files import replace_file
from llmkern.prune.bits import Bits, is_sharded, local, shard
from llmkern.prune.matrices import find
from llmkern.recipe import DEFAULT_IGNORE
from llmkern.solvers._checks import Pattern

KEY = "llmkern.masks"  # in the metadata of a file: JSON, name -> shape and transposed
# What wrappers of a block put into the names of its parameters: torch.compile, activation checkpointing.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
PATTERN_SIZES = (2, 4, 8, 16)
NO_REASONS: Mapping[str, str] = MappingProxyType({})


class MaskSet:
    """Masks of a model's parameters, one bit per weight, and hooks that keep the masked weights 0.

    Attached to an optimizer, the masked weights and what the optimizer keeps of them (any floating-point state of the
    parameter's shape: momentum, moments, master copies) are set to 0 after every step, so that no optimizer, weight
    decay or momentum from before brings one back. Parameters are looked up by name at every step: the model may be
    moved, wrapped (DDP), or sharded (FSDP2: `fully_shard`) after the masks were made; each rank then masks its share.

    model: holds the parameters; bits: parameter name -> `Bits`; skipped: layer -> why it has no mask.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Bits | Tensor], skipped: Mapping[str, str] = NO_REASONS
    ) -> None:
        """masks: by parameter name, `Bits`, or bool tensors of the parameter's shape (True = kept) of layers that hold
        their weight as [N, K]. Nothing is applied yet.

        ValueError naming the parameter for masks that do not fit the model; TypeError for tensors that are not bool.
        """
        self.model, self.skipped = model, dict(skipped)
        self.bits = _fitting(model, masks)
        self._shares: dict[str, tuple[Tensor, torch.device, Bits]] = {}
        self._attached: dict[int, tuple[Optimizer, bool, list[Any]]] = {}

    @classmethod
    def from_model(
        cls, model: nn.Module, targets: Iterable[str] | None = None, ignore: Iterable[str] | None = DEFAULT_IGNORE
    ) -> MaskSet:
        """The zeros of every linear layer's weight (nn.Linear, Conv1D, experts) that has any.

        targets, ignore: as in Recipe. Raises ValueError if there is no zero, and for what `prune.matrices.find`
        refuses.
        """
        found, skipped = find("MaskSet.from_model", model, targets, ignore)
        masks = {}
        for name, matrices in found.items():
            keep = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
            for matrix in matrices:
                matrix.of(keep).copy_(matrix.weight != 0)
            if not keep.all():
                masks[name] = Bits.pack(keep, matrices[0].transposed)
        if not masks:
            raise ValueError("MaskSet.from_model: no weight of a linear layer is 0: prune the model first")
        return cls(model, masks, skipped)

    def __len__(self) -> int:
        return len(self.bits)

    def __contains__(self, name: str) -> bool:
        return name in self.bits

    def mask(self, name: str) -> Tensor:
        """bool in the shape of the parameter, True = kept. KeyError for a parameter without a mask."""
        return self.bits[name].unpack()

    @property
    def nbytes(self) -> int:
        """Bytes of all bits."""
        return sum(bits.bits.nbytes for bits in self.bits.values())

    def sparsity(self, name: str | None = None) -> float:
        """The share of pruned weights: of one parameter, or of all that have a mask."""
        masks = [self.bits[name]] if name is not None else list(self.bits.values())
        return sum(bits.zeros() for bits in masks) / max(sum(bits.size for bits in masks), 1)

    @property
    def pattern(self) -> str | None:
        """The n:m that all masks have, m the first of 2, 4, 8, 16 for which there is one; None if there is none.

        n is the nearest to the mean number of zeros in m columns, so that a share of some zeros more counts as n:m too.
        """
        for m in PATTERN_SIZES:
            kept = torch.cat([bits.groups(m)[0] for bits in self.bits.values()])
            n = round(m - float(kept.double().mean())) if len(kept) else 0
            if 0 < n < m and self._breaks(f"{n}:{m}") is None:
                return f"{n}:{m}"
        return None

    @torch.no_grad()
    def apply(self) -> MaskSet:
        """Set the masked weights to 0, as they are held here and now. ValueError if the model no longer fits."""
        for parameter, bits in self._shares_now():
            bits.clear_(local(parameter))
        return self

    def check(self, pattern: str | None = None) -> MaskSet:
        """ValueError naming the first parameter with a masked weight that is not 0, on this rank.

        pattern: "n:m", also refuses a mask with fewer than n zeros in some m columns of a row.
        """
        for name, (parameter, bits) in zip(self.bits, self._shares_now(), strict=True):
            if revived := bits.revived(local(parameter)):
                raise ValueError(f"MaskSet.check: {name}: {revived} weights are not 0 that the mask prunes")
        if pattern is not None and (broken := self._breaks(pattern)):
            raise ValueError(f"MaskSet.check: {broken}: its mask is not {pattern}")
        return self

    @torch.no_grad()
    def attach(self, optimizer: Optimizer, *, gradients: bool = False) -> MaskSet:
        """Apply the masks, clear what the optimizer keeps of masked weights, and do both after every step from now on.

        optimizer: of torch, or accelerate's around one. gradients: set the gradients of masked weights to 0 before
        every step too, for optimizers that keep copies of the weights elsewhere than in `state`. Attached again, only
        the last call counts. The hooks hold the model until `detach`.

        Raises TypeError for anything else than an optimizer, ValueError for one that has none of the masked parameters
        (those of a model that was sharded since, or of another).
        """
        inner = _unwrapped(optimizer)
        masked = {id(parameter) for parameter, _ in self._shares_now()}
        if not any(id(parameter) in masked for group in inner.param_groups for parameter in group["params"]):
            raise ValueError(
                "MaskSet.attach: the optimizer has none of the masked parameters: give it those of this model, after "
                "the model is sharded"
            )
        self._detach(id(inner))

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._clear(optimizer)

        handles = [inner.register_step_post_hook(after)]
        if gradients:
            handles.append(inner.register_step_pre_hook(lambda *_: self._clear_gradients()))
        self._attached[id(inner)] = inner, gradients, handles
        self._clear(inner)
        return self

    def detach(self) -> MaskSet:
        """Remove all hooks."""
        for key in list(self._attached):
            self._detach(key)
        return self

    def replace(self, other: MaskSet) -> MaskSet:
        """Attach this in the place of `other`, wherever that is attached."""
        attached = list(other._attached.values())
        other.detach()
        for optimizer, gradients, _ in attached:
            self.attach(optimizer, gradients=gradients)
        return self

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> bits (uint8), shape, transposed: plain values for torch.save."""
        return {
            name: {"bits": bits.bits, "shape": list(bits.shape), "transposed": bits.transposed}
            for name, bits in self.bits.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take these masks in the place of those here; optimizers stay attached. Nothing is applied until a step.

        ValueError naming the parameter for masks that do not fit the model; the old ones then stay.
        """
        self.bits = _fitting(self.model, {name: _checked(name, entry) for name, entry in state.items()})
        self._shares = {}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, all or nothing. OSError where that cannot be."""
        from safetensors.torch import save

        about = {name: {"shape": list(bits.shape), "transposed": bits.transposed} for name, bits in self.bits.items()}
        tensors = {name: bits.bits.cpu() for name, bits in self.bits.items()}
        replace_file(Path(path), save(tensors, metadata={KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> MaskSet:
        """The masks of a file that `save` wrote, for this model, which may be sharded. Nothing is applied yet.

        FileNotFoundError without the file; ValueError for one that holds no masks, or masks that do not fit.
        """
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(path):
            raise FileNotFoundError(f"MaskSet.load: {path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[KEY])
                state = {name: {"bits": file.get_tensor(name), **entry} for name, entry in about.items()}
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"MaskSet.load: {path} holds no masks: {error}") from None
        masks = cls(model, {})
        masks.load_state_dict(state)
        return masks

    def _shares_now(self) -> list[tuple[Tensor, Bits]]:
        """The masked parameters as the model has them now, each with the bits of what this rank holds of it."""
        live = _parameters(self.model)
        found: list[tuple[Tensor, Bits]] = []
        for name, bits in self.bits.items():
            parameter = live.get(name)
            if parameter is None or tuple(parameter.shape) != bits.shape:
                raise ValueError(_misfit(name, bits.shape, parameter))
            known, device, share = self._shares.get(name, (None, None, bits))
            if known is not parameter or device != parameter.device:
                share = shard(name, bits, parameter)
                self._shares[name] = parameter, parameter.device, share
            found.append((parameter, share))
        return found

    @torch.no_grad()
    def _clear(self, optimizer: Optimizer) -> None:
        """The masked weights, and what an optimizer keeps of them."""
        for parameter, bits in self._shares_now():
            kept = optimizer.state.get(parameter, {}).values()
            states = [value for value in kept if _is_like(value, parameter)]
            bits.clear_(local(parameter), *map(local, states))

    @torch.no_grad()
    def _clear_gradients(self) -> None:
        for parameter, bits in self._shares_now():
            if parameter.grad is not None:
                bits.clear_(local(parameter.grad))

    def _breaks(self, pattern: str) -> str | None:
        """The first parameter whose mask is not n:m. ValueError for a pattern that is none."""
        wanted = Pattern.parse("MaskSet", pattern)
        if not wanted.m:
            raise ValueError(f'MaskSet: pattern must be "n:m", got {pattern!r}')
        most = wanted.m - wanted.n
        for name, bits in self.bits.items():
            if any(bool((kept > most).any()) for kept in bits.groups(wanted.m)):
                return name
        return None

    def _detach(self, key: int) -> None:
        for handle in self._attached.pop(key, (None, False, []))[2]:
            handle.remove()


def _fitting(model: nn.Module, masks: Mapping[str, Bits | Tensor]) -> dict[str, Bits]:
    """The masks as bits. ValueError naming the parameter where one does not fit."""
    live, found = _parameters(model), {}
    for name, mask in masks.items():
        parameter = live.get(name)
        if parameter is None or tuple(parameter.shape) != tuple(mask.shape):
            raise ValueError(_misfit(name, mask.shape, parameter))
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool:
                raise TypeError(f"MaskSet: {name}: the mask must be bool (True = kept), got {mask.dtype}")
            mask = Bits.pack(mask)
        found[name] = mask
    return found


def _misfit(name: str, shape: Iterable[int], parameter: Tensor | None) -> str:
    there = "the model has no such parameter" if parameter is None else f"the parameter is {list(parameter.shape)}"
    return f"MaskSet: {name}: the mask is for {list(shape)}, but {there}"


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names that they have without wrappers around blocks."""
    for module in model.modules():
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]  # FSDP2 leaves the outermost whole after a forward, a copy
    found = {}
    for name, parameter in model.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = parameter
    return found


def _checked(name: str, entry: Mapping[str, Any]) -> Bits:
    try:
        return Bits.checked(entry["bits"], tuple(entry["shape"]), entry["transposed"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"MaskSet: {name}: no mask: {type(error).__name__}: {error}") from None


def _unwrapped(optimizer: Any) -> Optimizer:
    """torch's optimizer inside accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"MaskSet.attach: wanted a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether it is a value per weight. Codes, as 8-bit optimizers keep, are not: there 0 is no zero."""
    plain = isinstance(value, Tensor) and (type(value) in (Tensor, nn.Parameter) or is_sharded(value))
    return plain and value.is_floating_point() and local(value).shape == local(parameter).shape
