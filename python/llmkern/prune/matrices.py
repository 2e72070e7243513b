"""Matrix: a weight [N, K] that can be pruned, and the parameter that it is, or is a part of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from llmkern import experts
from llmkern.nn import dense_weight, is_conv1d
from llmkern.patching import choose, tied
from llmkern.prune.bits import is_sharded
from llmkern.recipe import DEFAULT_IGNORE, Recipe


@dataclass(frozen=True, eq=False)
class Matrix:
    """layer: its name as in recipes; weight [N, K], a view of the parameter of that name, or of its expert `at`, which
    holds it as [K, N] if `transposed`.
    """

    layer: str
    parameter: str
    weight: Tensor
    at: int | None = None
    transposed: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """This matrix's part [N, K] of a tensor that is laid out as the parameter, a view."""
        part = whole if self.at is None else whole[self.at]
        return part.T if self.transposed else part


def find(
    caller: str, model: nn.Module, targets: Iterable[str] | None = None, ignore: Iterable[str] | None = DEFAULT_IGNORE
) -> tuple[dict[str, list[Matrix]], dict[str, str]]:
    """Parameter -> its matrices among the targets (as in Recipe); layer -> why it is left out.

    ValueError for a model whose weights are not all here (sharded, on the meta device), that holds packed layers or no
    linear ones, for a pattern that matches nothing, and for a layer whose weight is also another module's.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"{caller}: {name} is spread over ranks; make the masks before the model is sharded")
        if parameter.is_meta:
            raise ValueError(f"{caller}: {name} has no values: it is on the meta device")
    # Of the recipe only the patterns count.
    recipe = Recipe("magnitude", sparsity=0.5, targets=targets, ignore=ignore)  # type: ignore[arg-type]
    found: dict[str, list[Matrix]] = {}
    with experts.unfused(model):
        chosen, skipped = choose(model, recipe, caller)
        layers = {name: model.get_submodule(name) for name in chosen}
        for name, owners in tied(model, layers).items():
            raise ValueError(
                f"{caller}: layer {name}: its weight is also that of {', '.join(owners)}, which would be pruned too; "
                "give it a weight of its own, or ignore it"
            )
        mixtures = {name: mixture for name, mixture in experts.mixtures(model).items() if mixture.fused is not None}
        for name, layer in layers.items():
            matrix = _of_expert(name, layer, mixtures) or Matrix(
                name, f"{name}.weight", dense_weight(layer), transposed=is_conv1d(layer)
            )
            found.setdefault(matrix.parameter, []).append(matrix)
    return found, {skip.name: skip.reason for skip in skipped}


def _of_expert(name: str, layer: nn.Module, mixtures: Mapping[str, experts.Experts]) -> Matrix | None:
    """The matrix of an expert's layer, `HOME.3.gate_up_proj`, in the parameter `HOME.gate_up_proj`."""
    parts = name.rsplit(".", 2)
    if parts[0] not in mixtures:
        return None
    home, at, projection = parts
    return Matrix(name, f"{home}.{projection}", dense_weight(layer), int(at), mixtures[home].transposed)
