"""What the quantizer needs of a checkpoint, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from llmkern.formats import PackedWeight
from llmkern.nn import PackedLinear


class Expected(NamedTuple):
    """A packed layer to come: its shape (N, K), and the keywords of PackedLinear that are known before its weight."""

    shape: tuple[int, int]
    keywords: dict[str, Any]


class Weight(NamedTuple):
    """A packed weight, the bits of its codes, and the order of its columns."""

    packed: PackedWeight
    num_bits: int | None
    input_order: Tensor | None


class Source(Protocol):
    """A checkpoint, opened for one model. Names are the model's. Every method raises ValueError for bad content."""

    format: str  # of save_pretrained, and in the report
    notes: list[str]
    missing: list[str]  # packed layers that this class of model does not have

    def homes(self) -> set[str]:
        """Modules that are mixtures of experts with packed layers, and perhaps others."""
        ...

    def layers(self, model: nn.Module) -> dict[str, Expected]:
        """The packed layers; the mixtures among `homes` are `Experts` by now."""
        ...

    def check(self, model: nn.Module, layers: Mapping[str, PackedLinear]) -> None:
        """ValueError for tensors too many, too few, or of another shape."""
        ...

    def read(self, name: str, layer: PackedLinear) -> Weight:
        """The weight of one layer."""
        ...

    def late_names(self, model: nn.Module) -> list[str]:
        """Tensors that transformers cannot find under their names."""
        ...

    def late(self, model: nn.Module) -> dict[str, Tensor]:
        """Those tensors."""
        ...

    def finish(self, model: nn.Module) -> None:
        """ValueError for what is not as the checkpoint says, now that everything is loaded."""
        ...

    def why_dense(self, name: str) -> str:
        """Why a linear layer is not packed."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...
