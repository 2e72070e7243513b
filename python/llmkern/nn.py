"""PackedLinear: a linear layer whose weight is packed. It holds tensors and calls an op; no mathematics here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import formats
from llmkern._registry import OPS
from llmkern.formats import PackedWeight

FORMATS = {
    cls.__name__: cls
    for cls in (
        formats.Int8Weight,
        formats.Int4Weight,
        formats.Sparse24Weight,
        formats.Sparse24Int4Weight,
        formats.BitmaskWeight,
    )
}
# The optional tensors of a format: a buffer that is None when absent, so that the op always finds its arguments.
TENSORS = {
    "Int8Weight": ("codes", "scales", "zeros"),
    "Int4Weight": ("words", "scales", "zeros"),
    "Sparse24Weight": ("values", "positions", "scales"),
    "Sparse24Int4Weight": ("words", "positions", "scales"),
    "BitmaskWeight": ("values", "bits", "row_offsets", "scales"),
}
# Bits of a code as the format stores it; None for float values.
STORED_BITS = {"Int8Weight": 8, "Int4Weight": 4, "Sparse24Int4Weight": 4}

ORDER = "input_order"


class NoWeight:
    """What a packed layer has in the place of its dense weight: no tensor, and an error for functions that take it.

    T5 asks whether `wo.weight` is a tensor. torch's encoder hands `linear1.weight` to a fused kernel, unless it is
    something that torch's functions do not simply compute with; then it calls the layer.
    """

    _is_hf_initialized = True  # transformers gives values to what it did not find in a checkpoint, unless this says so

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """TypeError for any function of torch."""
        raise TypeError(f"{getattr(func, '__name__', func)}: a packed layer has no dense weight; see its unpack()")


# On every module inside a block that is read from files when it is needed: that block (`llmkern.streaming`).
BLOCK_MARK = "_llmkern_block"


class PackedLinear(nn.Module):
    """y = x @ Wᵀ + bias with W [N, K] in a packed format; x [..., K] fp32, bf16 or fp16.

    One class for all formats: they differ only in the names of their tensors and in the op, and a model that holds one
    kind of layer is simpler to walk, save and restore. The tensors are buffers under their canonical names, so
    `state_dict`, `to`, `deepcopy` and `pickle` work; they move between devices but keep their dtypes (a cast would
    change the weight). `activations="int8"` quantizes x per token on the fly (Int4Weight and Int8Weight only).

    `input_order` (a buffer too, int32 [K] or None): column j of the packed weight multiplies x[..., input_order[j]],
    as in checkpoints whose columns are grouped by their activations.

    The bias is the parameter it was. Gradients flow to x and the bias, never to the weight.

    `method`, `num_bits` and `act_order` are a record of how the weight was made, for whoever saves it: `num_bits` (2,
    3, 4, 8, None for float values) may be fewer than the format stores, and the codes are within their range.
    """

    weight = NoWeight()  # no dense weight is kept; see `unpack`
    bias: nn.Parameter | None
    input_order: Tensor | None

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None = None, *, activations: str | None = None,
        conv1d: bool = False, method: str = "", num_bits: int | None = None, act_order: str | None = None,
        input_order: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`conv1d`: the dense layer it stands for keeps its weight as [K, N]; `method`: the recipe that made it.

        num_bits: of its codes, by default what the format stores. act_order: "static" if the solver took the columns in
        the order of their activations. ValueError for a wrong bias or option, or an `input_order` that is no
        permutation.
        """
        super().__init__()
        self.format = type(packed).__name__
        if self.format not in FORMATS:
            raise TypeError(f"PackedLinear: wanted a packed weight of llmkern.formats, got {self.format}")
        self.out_features, self.in_features = self.shape = packed.shape
        self.group_size = packed.group_size
        self.activations, self.conv1d, self.method = activations, conv1d, method
        self.num_bits, self.act_order = _bits(packed, num_bits), act_order
        if act_order not in (None, "static"):
            raise ValueError(f'PackedLinear: act_order must be None or "static", got {act_order!r}')
        self._op, self._extra = _op(self.format, activations)
        tensors = packed.tensors()
        for name in TENSORS[self.format]:
            self.register_buffer(name, tensors.get(name))
        self.register_buffer(ORDER, None if input_order is None else _checked_order(input_order, self.in_features))
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"PackedLinear: bias must be [N]=[{self.out_features}], got {list(bias.shape)}")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, packed: PackedWeight, *, activations: str | None = None, method: str = "",
        num_bits: int | None = None, act_order: str | None = None,
    ) -> PackedLinear:  # fmt: skip
        """The layer that replaces `linear` (nn.Linear or Conv1D): its bias and training mode, with a packed weight."""
        bias: Any = linear.bias
        layer = cls(
            packed, bias, activations=activations, conv1d=is_conv1d(linear), method=method, num_bits=num_bits,
            act_order=act_order,
        )  # fmt: skip
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        return self.linear(x, self._parameters["bias"])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with a bias [N] of the caller's instead of the layer's own."""
        buffers = self._buffers
        weight = [buffers[name] for name in TENSORS[self.format]]
        if (order := buffers[ORDER]) is not None:
            x = x.index_select(-1, order)
        return OPS[self._op].op(x, *weight, bias, self.group_size, *self._extra)

    @property
    def op(self) -> str:
        """The name of the op that `forward` calls."""
        return self._op

    @property
    def packed(self) -> PackedWeight:
        """The weight as one of `llmkern.formats`, sharing this layer's tensors, its columns in `input_order`; not
        validated again.
        """
        tensors: dict[str, Any] = {name: self._buffers[name] for name in TENSORS[self.format]}
        return FORMATS[self.format](**tensors, shape=self.shape, group_size=self.group_size)

    def fill(self, packed: PackedWeight, num_bits: int | None = None, input_order: Tensor | None = None) -> None:
        """Take this weight in the place of the one here, of whatever format; arguments as for a new layer.

        Its shape is that of the layer, or less where the layer is one rank's share of a larger one (tensor parallel):
        `shape` is what is held, `out_features` and `in_features` are those of the whole layer.
        """
        self.format, self.shape, self.group_size = type(packed).__name__, packed.shape, packed.group_size
        self._op, self._extra = _op(self.format, self.activations)
        self.num_bits = _bits(packed, num_bits)
        order = None if input_order is None else _checked_order(input_order, self.in_features)
        self._buffers = {name: packed.tensors().get(name) for name in TENSORS[self.format]} | {ORDER: order}

    @property
    def is_share(self) -> bool:
        """Whether it holds one rank's share of its weight."""
        return self.shape != (self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and the order of its columns, without the bias."""
        order = self._buffers[ORDER]
        return self.packed.nbytes + (0 if order is None else order.nbytes)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K], its columns in the order of x."""
        dense, order = self.packed.unpack(dtype), self._buffers[ORDER]
        return dense if order is None else dense.index_select(1, order.argsort())

    def extra_repr(self) -> str:
        """Format, shape and grid, as `print(model)` shows them."""
        groups = "per row" if self.group_size >= self.in_features else f"group_size={self.group_size}"
        values = next(iter(self.packed.tensors().values())).dtype
        parts = [
            f"{self.in_features}, {self.out_features}, {self.format}, {str(values).removeprefix('torch.')}, {groups}",
            f"num_bits={self.num_bits}" if self.num_bits != STORED_BITS.get(self.format, self.num_bits) else "",
            f"bias={self.bias is not None}",
            f"activations={self.activations}" if self.activations else "",
            "input_order" if self._buffers[ORDER] is not None else "",
        ]
        return ", ".join(part for part in parts if part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self


def _checked_order(order: Tensor, k: int) -> Tensor:
    """The order as int32 [K]. ValueError unless it holds every column once."""
    if order.dtype not in (torch.int32, torch.int64) or order.shape != (k,):
        raise ValueError(f"PackedLinear: input_order must be int32 [K]=[{k}], got {order.dtype} {list(order.shape)}")
    if not torch.equal(order.sort().values.long(), torch.arange(k, device=order.device)):
        raise ValueError(f"PackedLinear: input_order must hold each of 0..{k - 1} once")
    return order.to(torch.int32)


def _op(name: str, activations: str | None) -> tuple[str, tuple[Any, ...]]:
    """The op of a format and its arguments after group_size."""
    if activations not in (None, "int8"):
        raise ValueError(f'PackedLinear: activations must be None or "int8", got {activations!r}')
    if name == "Int4Weight":
        return "int4_linear", (activations,)
    if name == "Int8Weight" and activations:
        return "int8_dynamic_linear", ()
    if activations:
        raise ValueError(f"PackedLinear: int8 activations go with Int4Weight and Int8Weight, got {name}")
    return FORMATS[name].ops[0], ()


def _bits(packed: PackedWeight, bits: int | None) -> int | None:
    """The bits of the codes; ValueError for some that the format cannot have."""
    name = type(packed).__name__
    stored = STORED_BITS.get(name, 8 if getattr(packed, "scales", None) is not None else None)
    if bits is None:
        return stored
    possible = (2, 3, 4) if stored == 4 else (stored,)
    if type(bits) is not int or bits not in possible:
        raise ValueError(f"PackedLinear: num_bits of {name} must be one of {possible}, got {bits!r}")
    return bits


def is_linear(module: nn.Module) -> bool:
    """Whether this is a dense linear layer: nn.Linear itself, or a Conv1D of GPT-2."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (weight [in, out]), known by its name and layout: transformers is not imported here."""
    if type(module).__name__ != "Conv1D" or not isinstance(getattr(module, "nf", None), int):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == module.nf


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a dense linear layer, a view of its parameter."""
    weight = linear.weight.detach()  # type: ignore[operator]
    return weight.T if is_conv1d(linear) else weight


def packed_names(model: nn.Module) -> set[str]:
    """The names of all tensors of packed weights."""
    return {
        f"{name}.{buffer}"
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, PackedLinear)
        for buffer in layer._buffers
    }
