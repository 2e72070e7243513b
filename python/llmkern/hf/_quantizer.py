"""The quantizer "llmkern" of transformers: packed layers while from_pretrained loads a model.

transformers builds the model without values, asks for changes, loads what it finds names for, asks again. The first
time the linear layers of the checkpoint become packed layers without a weight, whose names no loader looks for; the
second time their weights are read, one by one, straight from the files. Everything else (embeddings, norms, dense
layers, biases; devices, dtypes, ties, shards) is loaded by transformers as always.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkern import experts
from llmkern.formats import Int4Weight, PackedWeight
from llmkern.hf import _dense, _parallel
from llmkern.hf._foreign import Foreign
from llmkern.hf._own import Own
from llmkern.hf._report import report_of
from llmkern.hf._source import Expected, Source
from llmkern.nn import PackedLinear, dense_weight, is_conv1d, is_linear
from llmkern.patching import swap_all


@register_quantization_config("llmkern")
class LoadConfig(QuantizationConfigMixin):
    """How from_pretrained makes packed layers; `LoadConfig(dequantize=True)` makes dense ones of their values.

    The other fields are filled in when a checkpoint is met.
    """

    METHOD = "llmkern"

    def __init__(
        self, dequantize: bool = False, *, quant_method: str = METHOD, folder: str | None = None,
        foreign: Mapping[str, Any] | None = None, as_stored: bool = True,
    ) -> None:  # fmt: skip
        """folder: llmkern.save's; foreign: the quantization_config of others; as_stored: keep the files' dtypes."""
        if quant_method != self.METHOD:
            raise ValueError(f"LoadConfig: quant_method must be {self.METHOD!r}, got {quant_method!r}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.dequantize, self.folder, self.foreign, self.as_stored = dequantize, folder, foreign, as_stored

    def to_dict(self) -> dict[str, Any]:
        """What a config.json gets to see: nothing of this machine."""
        return {"quant_method": self.METHOD}


@register_quantizer("llmkern")
class LlmkernQuantizer(HfQuantizer):
    """One load: `report` says at its end what was packed and what was not; `format` is that of the checkpoint."""

    requires_calibration = True
    quantization_config: LoadConfig

    def __init__(self, quantization_config: LoadConfig, **kwargs: Any) -> None:
        """Raises ValueError for a dense checkpoint: `llmkern.compress` and `llmkern.patch` pack those."""
        super().__init__(quantization_config, **kwargs)
        self.report: Any = None
        self.format = "compressed-tensors"
        self._source: Any = None
        self._layers: dict[str, PackedLinear] = {}
        self._ties: dict[str, str] = {}
        self._styles: dict[str, str] = {}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """ValueError for more than one device, or the disk: nothing moves a packed layer between them."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise ValueError(
                f"from_pretrained: packed layers are on one device, got a device_map with {', '.join(sorted(devices))}"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """The one device there is for "auto" and the like; ValueError where there are several."""
        if not isinstance(device_map, str):
            return device_map
        count = torch.cuda.device_count()
        if count > 1:
            raise ValueError(f"from_pretrained: packed layers are on one device; name one, not {device_map!r}")
        return {"": torch.device("cuda:0" if count else "cpu")}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The files' own dtypes, unless the caller named one."""
        return None if self.quantization_config.as_stored else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        self._source = source = self._open(checkpoint_files, model)
        homes = source.homes()
        with experts.unfused(model, only=homes.__contains__):
            self._layers = {
                name: _waiting(model, name, expected) for name, expected in source.layers(model).items()
            }  # fmt: skip
            swap_all(model, self._layers)
        parallel = (getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1) > 1
        for module in (*self._layers.values(), *(m for e in experts.mixtures(model).values() for m in e.modules())):
            module._is_hf_initialized = True  # type: ignore[assignment]
            if parallel and isinstance(module, PackedLinear):
                module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]
        self._untie(model)
        source.check(model, self._layers)
        self._quiet(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        device, rank = model.device, _parallel.rank_of(model)
        for name, tensor in self._source.late(model).items():
            _set(model, name, tensor if self.quantization_config.as_stored else _cast(tensor, model), device)
        for name, layer in self._layers.items():
            try:
                packed, num_bits, order = self._source.read(name, layer)
                if rank is not None:
                    packed = self._share(model, name, layer, packed, rank)
                if order is not None and packed.shape[1] < layer.in_features:
                    raise NotImplementedError("tensor parallel: columns in an order of their own cannot be shared")
            except (ValueError, TypeError, NotImplementedError) as error:
                raise type(error)(f"from_pretrained: layer {name}: {error}") from None
            layer.fill(packed.to(device), num_bits, None if order is None else order.to(device))
        for name, source in self._ties.items():
            owner, leaf = name.rpartition(".")[::2]
            model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)
        self._source.finish(model)
        self.report = report_of(model, self._layers, self._source)
        self._source.close()
        self._source, self._layers = None, {}
        if self.quantization_config.dequantize:
            _dense.restore(model, model.dtype)
        return model

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Keep what the plan says of experts; transformers no longer finds their parameters."""
        if plan is model.tp_plan:
            self._styles = _parallel.take_styles(model, plan)

    def _share(self, model: Any, name: str, layer: PackedLinear, packed: PackedWeight, rank: Any) -> PackedWeight:
        """This rank's share of a layer's weight."""
        home = name.rsplit(".", 2)[0]
        mixture = model.get_submodule(home)
        inside = isinstance(mixture, experts.Experts)
        if inside and (dense := next((n for n, m in mixture.named_modules() if isinstance(m, nn.Linear)), None)):
            raise NotImplementedError(f"tensor parallel: {home}.{dense} is dense, and shared with packed experts only")
        style = _parallel.style_of(name, home if inside else "", {**(model.tp_plan or {}), **self._styles})
        mixed = inside and not getattr(mixture.gating, "is_concatenated", True)
        packed = _parallel.share(packed, style, rank, mixed)
        if inside:
            _parallel.cut_bias(layer, style, rank, mixed)
        return packed

    def _open(self, checkpoint_files: Any, model: Any) -> Source:
        paths = [Path(file) for file in checkpoint_files or ()]
        if self.quantization_config.folder is None:
            return Foreign(paths[0].parent, model)
        source = Own(Path(self.quantization_config.folder), paths, model)
        self.format = source.format if source.format != "dense" else self.format
        return source

    def _untie(self, model: Any) -> None:
        """Take ties of packed layers out of transformers' hands, which would give the layer a dense weight."""
        kept: dict[str, str] = {}
        for name, other in model.all_tied_weights_keys.items():
            ends = [name.rpartition("."), other.rpartition(".")]
            if not any(isinstance(model.get_submodule(owner), PackedLinear) for owner, _, _ in ends):
                kept[name] = other
            elif all(leaf == "bias" for _, _, leaf in ends):
                self._ties[name] = other
        model.all_tied_weights_keys = kept

    def _quiet(self, model: Any) -> None:
        """What the source has checked is no news: transformers would list every tensor of a packed layer."""
        late = [f"^{name}$".replace(".", r"\.") for name in (*self._source.late_names(model), *self._ties)]
        for key, more in (("_keys_to_ignore_on_load_unexpected", [""]), ("_keys_to_ignore_on_load_missing", late)):
            known = getattr(model, key)
            # A list or None in the first 5.x.
            setattr(model, key, {*known, *more} if isinstance(known, set) else [*(known or ()), *more])

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        _dense.restore(model, dtype)
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes what llmkern.save writes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients, but gradients flow through them to what has: adapters, biases, norms."""
        return True

    @property
    def is_compileable(self) -> bool:
        """All ops work under torch.compile."""
        return True


def _waiting(model: Any, name: str, expected: Expected) -> PackedLinear:
    """A packed layer without a weight in the place of a dense one, with its bias. ValueError if it does not fit."""
    dense, shape = model.get_submodule(name), expected.shape
    if not is_linear(dense):
        raise ValueError(f"from_pretrained: layer {name} is a {type(dense).__name__}, wanted a linear layer")
    if (wanted := tuple(dense_weight(dense).shape)) != shape:
        raise ValueError(
            f"from_pretrained: layer {name} is {list(shape)} in the checkpoint, {list(wanted)} in the model"
        )
    nothing = Int4Weight(None, None, None, shape=shape, group_size=max(shape[1], 1))  # type: ignore[arg-type]
    return PackedLinear(nothing, dense.bias, conv1d=is_conv1d(dense), **expected.keywords)


def _set(model: Any, name: str, tensor: Tensor, device: torch.device) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor.to(device)
    else:
        module._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=tensor.is_floating_point())


def _cast(tensor: Tensor, model: Any) -> Tensor:
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor
