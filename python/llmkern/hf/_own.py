"""A folder that llmkern.save wrote, as transformers loads it: which layers are packed, and their weights one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmkern import expert_tensors, experts
from llmkern.checkpoint_folder import EXTRA, META, check_unchanged
from llmkern.expert_files import join
from llmkern.formats import compressed_tensors as ct
from llmkern.formats import gptq_checkpoint
from llmkern.hf._source import Expected, Weight
from llmkern.hf._tensors import Place, Tensors
from llmkern.loading import LEAVES, _entry, _names, _read_meta, _rename, _some
from llmkern.nn import ORDER, PackedLinear
from llmkern.weight_files import FLOATS


class Own:
    """The source of packed layers that the quantizer asks. Names are those of the model, whatever class it is."""

    def __init__(self, folder: Path, paths: Iterable[Path], model: nn.Module) -> None:
        """Raises as llmkern.load does for what is missing, unknown or broken in llmkern.json and the files' headers."""
        self.meta = _read_meta(folder)
        paths, beside = list(paths), [folder / EXTRA] if (folder / EXTRA).is_file() else []
        check_unchanged(folder, self.meta, [*paths, *beside])
        self.format: str = self.meta["format"]
        self.entries: dict[str, Any] = self.meta["layers"]
        self.tied: dict[str, str] = self.meta["tied"]
        self.tensors, self.extra = Tensors(paths), Tensors(beside)
        _rename(self.tensors.places, self.meta.get("renamed", {}))
        self.notes: list[str] = []
        self.missing: list[str] = []  # packed layers that this class of model does not have

        # A base model's names have no prefix.
        rename = self.rename = _renaming(model)
        self.entries = {rename(name): entry for name, entry in self.entries.items()}
        self.tied = {rename(name): rename(source) for name, source in self.tied.items()}
        self.tensors.rename(rename)
        self.extra.rename(rename)

    def homes(self) -> set[str]:
        """Names under which there are packed layers: a mixture among them was saved as linear layers of its own."""
        return {parent for name in self.entries for parent in accumulate(name.split("."), "{}.{}".format)}

    def layers(self, model: nn.Module) -> dict[str, Expected]:
        """The layers of llmkern.json. ValueError for a bad entry."""
        for home, mixture in experts.mixtures(model).items():
            self._unstack(home, mixture)
        names = dict(model.named_modules())
        same = type(model).__name__ == self.meta["model_class"]
        found = {}
        for name, fields in self.entries.items():
            _, shape, _, activations, record = _entry(name, fields)
            if name in names:
                keywords = {"activations": activations, "method": record["method"], "act_order": record["act_order"]}
                found[name] = Expected(shape, keywords)
            elif same:
                raise ValueError(f"from_pretrained: {META} names the layer {name}, which the model does not have")
            else:
                self.missing.append(name)
        return found

    def check(self, model: nn.Module, layers: Mapping[str, PackedLinear]) -> None:
        """ValueError for a tensor too many or too few, or of another shape: transformers would make up what lacks.

        A model of another class than the saved one (a base model, another head) has less, or more, by intention.
        """
        if type(model).__name__ != self.meta["model_class"]:
            self.notes.append(f"the folder holds a {self.meta['model_class']}, loaded as {type(model).__name__}")
            return
        packed = {name for layer in layers for part in self._parts(layer) for name in self._leaves(part).values()}
        wanted = {name: t for name, t in model.state_dict().items() if name not in self.tied}
        files = ", ".join(sorted({place.file for place in self.tensors.places.values()}))
        if missing := wanted.keys() - self.tensors.places.keys():
            raise ValueError(f"from_pretrained: {files} lacks {len(missing)} tensors: {_some(missing)}")
        if unknown := self.tensors.places.keys() - wanted.keys() - packed:
            raise ValueError(f"from_pretrained: {files} holds {len(unknown)} unknown tensors: {_some(unknown)}")
        for name, tensor in wanted.items():
            shape, dtype = self.tensors.shape(name), self.tensors.dtype(name)
            where = f"from_pretrained: {self.tensors.file_of(name)}: {name}"
            if shape != list(tensor.shape):
                raise ValueError(f"{where} must be {list(tensor.shape)}, got {shape}")
            if dtype not in (FLOATS.values() if tensor.is_floating_point() else (tensor.dtype,)):
                raise ValueError(f"{where} must be of a dtype such as {tensor.dtype}, got {dtype}")
        if unknown := {name for name in self.extra.places if name.rpartition(".")[0] not in layers}:
            raise ValueError(f"from_pretrained: {EXTRA} holds unknown tensors: {_some(unknown)}")

    def read(self, name: str, layer: PackedLinear) -> Weight:
        """The packed weight of a layer. ValueError for what is missing or out of range in its tensors."""
        kind, shape, group_size, _, record = _entry(name, self.entries[name])
        parts = [
            {leaf: self.tensors.read(key) for leaf, key in self._leaves(part).items()} for part in self._parts(name)
        ]
        own = join(name, parts, self.format) if "parts" in self.entries[name] else parts[0]
        extra = {leaf: self.extra.read(key) for leaf, key in self.extra.of(name).items()}
        if layer.conv1d and "weight" in own and "weight_scale" not in own:
            own["weight"] = own["weight"].T.contiguous()
        order = extra.pop(ORDER, None)
        if (order is not None) != bool(self.entries[name].get(ORDER)):
            raise ValueError(f"{EXTRA} {'lacks' if order is None else 'holds an unknown'} tensor {name}.{ORDER}")
        decode = gptq_checkpoint.decode if self.format == "gptq" else ct.decode
        bits = record["num_bits"]
        return Weight(decode(kind, own, extra, shape=shape, group_size=group_size, bits=bits), bits, order)

    def finish(self, model: nn.Module) -> None:
        """ValueError unless what the folder says is tied is tied: it holds no values for it."""
        if type(model).__name__ == self.meta["model_class"]:
            shared = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
            for name, source in self.tied.items():
                if name not in shared or shared[name] != shared.get(source):
                    raise ValueError(f"from_pretrained: {META} ties {name} to {source}, which the model does not")

    def late_names(self, model: nn.Module) -> list[str]:
        """The tensors that transformers cannot find, as they are parts of a stack or have another name there."""
        wanted = model.state_dict()
        return [
            name
            for name, place in self.tensors.places.items()
            if name in wanted and (place.at is not None or (".gating." in name and ".gating." not in place.key))
        ]

    def late(self, model: nn.Module) -> dict[str, Tensor]:
        """Those tensors."""
        return {name: self.tensors.read(name) for name in self.late_names(model)}

    def why_dense(self, name: str) -> str:
        """Why a linear layer is not packed."""
        return "it is dense in the folder"

    def close(self) -> None:
        """Let go of the files."""
        self.tensors.close()
        self.extra.close()

    def _parts(self, layer: str) -> list[str]:
        """The names under which a layer is in the files: its own, or those of the matrices that it is made of."""
        entry = self.entries[layer]
        return [self.rename(part) for part in _names(layer, entry["parts"])] if "parts" in entry else [layer]

    def _leaves(self, part: str) -> dict[str, str]:
        """The tensors of a packed weight; what no layer has is left to be an unknown one."""
        return {leaf: name for leaf, name in self.tensors.of(part).items() if leaf in LEAVES and leaf != "bias"}

    def _unstack(self, home: str, mixture: experts.Experts) -> None:
        """Name the parts of a mixture that is stored in the model's own layout. ValueError for a wrong stack."""
        parts = expert_tensors.parts_of(home, mixture)
        places = dict(self.tensors.places)
        if not all(whole in places for whole in parts):
            return
        for whole, names in parts.items():
            shape, place = self.tensors.shape(whole), places.pop(whole)
            if len(shape) < 2 or shape[0] != len(names):
                raise ValueError(f"from_pretrained: {whole} must hold {len(names)} experts, got {shape}")
            for at, name in enumerate(names):
                places[name] = Place(place.file, place.key, at, mixture.transposed and len(shape) == 3)
        for name in mixture.gating.state_dict():
            if f"{home}.{name}" in places:
                places[f"{home}.gating.{name}"] = places.pop(f"{home}.{name}")
        self.tensors.places = places


def _renaming(model: Any) -> Callable[[str], str]:
    """The saved model's names -> those of `model`, where one of the two is the base model without the prefix."""
    prefix = model.base_model_prefix
    base = model._modules.get(prefix)

    def rename(name: str) -> str:
        first, _, rest = name.partition(".")
        if first not in tops and first == prefix and rest.partition(".")[0] in tops:
            return rest
        return f"{prefix}.{name}" if first not in tops and first in inside else name

    tops, inside = _tops(model), _tops(base) if base is not None else set()
    return rename


def _tops(module: nn.Module) -> set[str]:
    return {*module._modules, *module._parameters, *module._buffers}
