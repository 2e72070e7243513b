"""Models larger than memory: the weights of a repeated block are read from its files when the block is needed.

    stream(folder)   config.json -> skeleton on the meta device -> all that is outside the blocks is loaded, as it is
    a forward        each block reads its weights just before it runs; the one before it gives its own back
    held(block)      as long as its layers are calibrated and solved, a block stays

A parameter is given back only if it is still what was read: packed layers, and dense weights that were written to, stay
in memory. Which tensor of the files belongs where is decided by transformers itself (names, merged experts, dtypes).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern import blocks, experts
from llmkern._pages import give_back
from llmkern.experts import Experts
from llmkern.nn import BLOCK_MARK, dense_weight
from llmkern.weight_files import Files, Reader, read_config, skeleton


class Read(NamedTuple):
    """A parameter as it was read from a file; a higher version means that it was written to since.

    Weak: a layer that is replaced takes its dense weight with it.
    """

    parameter: weakref.ref[nn.Parameter]
    version: int

    def still(self, current: nn.Parameter | None) -> bool:
        """Whether `current` is the parameter, and as it was read."""
        return current is not None and self.parameter() is current and current._version == self.version


class Block:
    """One repeated block whose parameters come from files."""

    def __init__(self, stream: Stream, name: str, module: nn.Module, sources: dict[str, str], converted: bool) -> None:
        """`sources`: tensor of the files -> (first) parameter that it becomes; `converted`: not one to one."""
        self.stream, self.name, self.sources, self.converted = stream, name, sources, converted
        self.pins = 0
        self._read: dict[str, Read] = {}
        for part in module.modules():
            object.__setattr__(part, BLOCK_MARK, self)
        module.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: tuple) -> None:
        self.stream.need(self)

    def load(self) -> None:
        """Read every parameter that is not in memory. ValueError for one that the files do not give."""
        absent = {name for name, parameter in self._parameters() if parameter.is_meta}
        if not absent:
            return
        mixtures = self._mixtures()
        everything = self.converted or bool(mixtures)
        self._read_into({m: m.fused for m in mixtures}, None if everything else absent)
        for mixture in mixtures:
            mixture.renew()
            self.stream.check(mixture)
        for name, parameter in self._parameters():
            if parameter.is_meta:
                raise ValueError(f"stream: {self.stream.files.folder}: no values for {name}")
            if name in absent or everything:
                parameter.requires_grad_(False)
                self._read[name] = Read(weakref.ref(parameter), parameter._version)

    def _read_into(self, fused: dict[Any, Any], absent: set[str] | None) -> None:
        """Read these parameters (None: all that are not packed), with the mixtures' modules as the files have them."""
        block = self.stream.model.get_submodule(self.name)
        experts.replace(block, fused)
        try:
            wanted = {name for name, _ in self._parameters()} if absent is None else absent
            self.stream.read([key for key, target in self.sources.items() if target in wanted])
        finally:
            experts.replace(block, {module: mixture for mixture, module in fused.items()})

    def release(self) -> None:
        """Give back the matrices that are still as they were read. Vectors stay: reading them costs more than they."""
        current, mixtures = dict(self._parameters()), self._mixtures()
        same = {name for name, read in self._read.items() if read.still(current.get(name))}
        everything = self.converted or bool(mixtures)
        if everything and same != self._read.keys():
            # Several parameters come from one tensor of the files: reading one again would reset the others.
            return
        again = same if everything else same & set(self.sources.values())
        for name in [name for name in again if current[name].ndim > 1]:
            _set(self.stream.model, name, _on_meta(current[name]))
            del self._read[name]
        for mixture in mixtures if again else ():
            assert mixture.fused is not None
            own = mixture.fused._parameters
            own.update({name: _on_meta(p) for name, p in own.items() if p is not None and p.ndim > 1})

    def _mixtures(self) -> list[Experts]:
        """Mixtures that stand in the place of a module with the weights as the files have them."""
        found = experts.mixtures(self.stream.model.get_submodule(self.name)).values()
        return [mixture for mixture in found if mixture.fused is not None]

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.stream.model.get_submodule(self.name).named_parameters(self.name)


class Stream:
    """The blocks of one model and the files that they come from; at most one block is in memory, and those held."""

    def __init__(self, model: nn.Module, files: Files) -> None:
        self.model, self.files = model, files
        self.reader = Reader(model, files)
        self.bytes = 0  # read from the files so far
        self._current: Block | None = None
        self._checked: set[type] = set()  # kinds of fused modules that `Experts` were compared with
        targets, unknown = self.reader.targets(model)
        files.warn_unknown(model, unknown)
        inside = self._inside()
        groups: dict[str | None, dict[str, str]] = {}
        for key, target in targets.items():
            groups.setdefault(inside.get(target.name), {})[key] = target.name
        several = {inside.get(target.name) for target in targets.values() if target.converted}
        files.check(model, targets)
        self.read(list(groups.pop(None, {})))
        loaded = {target.name for target in targets.values()}
        model.tie_weights(  # type: ignore[operator]
            missing_keys={name for name in model.state_dict() if name not in loaded}, recompute_mapping=False
        )
        absent = [n for n, parameter in model.named_parameters() if parameter.is_meta and n not in inside]
        absent += sorted(n for n, name in inside.items() if n not in loaded and name not in several)
        if absent:
            raise ValueError(f"stream: {files.folder}: no values for {absent[0]} ({len(absent)} parameters)")
        for name, sources in groups.items():
            assert name is not None
            Block(self, name, model.get_submodule(name), sources, name in several)

    def _inside(self) -> dict[str, str]:
        """Parameter -> its block; without those that are known under another name as well (tied)."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        alone = {found[0] for found in names.values() if len(found) == 1}
        inside: dict[str, str] = {}
        for here, block in blocks.named(self.model):
            inside |= {name: here for name, _ in block.named_parameters(here) if name in alone}
        return inside

    def need(self, block: Block) -> None:
        """Have `block` in memory; the one that was needed before goes, unless it is held."""
        if self._current is not None and self._current is not block and not self._current.pins:
            self._current.release()
            # Blocks come and go in pieces of a few MB, which an allocator would keep, and find no use for.
            give_back()
        self._current = block
        block.load()

    def read(self, keys: list[str]) -> None:
        """Read these tensors of the files into the parameters that they belong to."""
        if keys:
            with torch.inference_mode(False), torch.no_grad():
                self.reader.load(self.model, keys)
            self.bytes += sum(self.files.tensors[key].nbytes for key in keys)

    def check(self, mixture: Experts) -> None:
        """Compare `Experts` with the module that they replaced, once there are values. ValueError if they differ."""
        if type(mixture.fused) not in self._checked and (difference := mixture.difference()):
            raise ValueError(f"stream: {type(mixture.fused).__name__}: {difference}; load the whole model instead")
        self._checked.add(type(mixture.fused))

    def left(self, block: Block) -> None:
        """`block` is held once less. It stays until another is needed, unless that has happened already."""
        if not block.pins and block is not self._current:
            block.release()


def stream(folder: str | Path, *, dtype: torch.dtype | str = "auto") -> Any:
    """The causal language model of a local folder of safetensors, its repeated blocks left in the files until needed.

    The folder may hold one file or several with an index, of fp32, bf16 or fp16; dtype as for `load_model`. The model
    is in eval mode, on the CPU, and runs, compresses and saves like any other, with one block of dense weights in
    memory at a time. It is not for training: the blocks' parameters take no gradient.

    Raises FileNotFoundError without config.json or safetensors, ImportError without transformers, ValueError for
    files that are broken, quantized, or lack a parameter or hold it in another shape.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    files = Files(folder)
    model = skeleton(config, files.dtype(config) if dtype == "auto" else dtype, folder)
    object.__setattr__(model, "_llmkern_stream", Stream(model, files))
    return model.eval()


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Inside, the block that `module` is or is a part of stays in memory. Nothing to do for what is not streamed."""
    block: Block | None = vars(module).get(BLOCK_MARK)
    if block is None:
        yield
        return
    block.stream.need(block)
    block.pins += 1
    try:
        yield
    finally:
        block.pins -= 1
        block.stream.left(block)


def read_bias(linear: nn.Module) -> None:
    """Have the bias of a linear layer in memory, if it has one. It stays when its block goes, as all vectors do."""
    if linear.bias is not None and linear.bias.is_meta:
        with held(linear):
            pass


def home_of(linear: nn.Module) -> torch.device:
    """Where the weight of a dense linear layer is, or will be once it is read: a streamed model is on the CPU."""
    weight = dense_weight(linear)
    return torch.device("cpu") if weight.is_meta else weight.device


def is_streamed(model: nn.Module) -> bool:
    """Whether the model's blocks are read from files."""
    return "_llmkern_stream" in vars(model)


def parameter(module: nn.Module, leaf: str) -> nn.Parameter:
    """A parameter of a module, read from its file if it is not in memory; its block then stays until another comes."""
    block: Block | None = vars(module).get(BLOCK_MARK)
    if block is not None:
        block.stream.need(block)
    found = module._parameters[leaf]
    assert found is not None
    return found


def values_of(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer in the order of `named_parameters` and `named_buffers`, a block at a time."""
    for name, _ in [*model.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        yield parameter(model.get_submodule(owner), leaf)
    yield from model.buffers()


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
