"""Mixtures of experts whose weights are 3-D parameters, as linear layers of their own.

    fused (transformers 5)                               Experts
    gate_up_proj [E, 2I, H]   (or up_proj [E, I, H])     experts.0.gate_up_proj   nn.Linear, a view of gate_up_proj[0]
    down_proj    [E, H, I]                               experts.0.down_proj      nn.Linear, a view of down_proj[0]
    *_bias       [E, ...]     where there are any        experts.1.gate_up_proj   ...
    act_fn, _apply_gate, post_expert_norm                experts.gating           the fused module without its weights

As linear layers they are calibrated, solved, packed, named in recipes and saved like any other. Nothing is copied: the
layers share the memory of the 3-D parameters until they are packed. What a mixture is shows in its attributes, those
that transformers' own `batched_mm` and `grouped_mm` forwards go by (transformers.integrations.moe), and `Experts` is
compared with the fused module on a few tokens before it takes its place.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmkern.nn import BLOCK_MARK, PackedLinear

# The difference from the fused module's output, relative to its norm, that rounding may make.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Mode(NamedTuple):
    """How a mixture runs while the inputs of its layers are collected.

    everything: every expert sees every token, as far as its own layers are concerned; what the mixture returns follows
    the routing all the same. rows: bool [tokens], False for padding, which no expert sees; None for no padding.
    """

    everything: bool
    rows: Tensor | None


class Experts(nn.Module):
    """The experts of a mixture as linear layers, dense or packed: `<expert>.gate_up_proj` and `<expert>.down_proj`.

    Runs only the experts that some token is routed to. One device-to-host copy per call (tokens per expert), as in the
    forward of the fused module.
    """

    fused: nn.Module | None  # until one of the layers is packed

    def __init__(self, fused: nn.Module) -> None:
        """The layers view the parameters of `fused`, which `build` has found to be known."""
        super().__init__()
        first, down = _projections(fused)
        self.transposed = _is_transposed(fused)
        self.num_experts = int(getattr(fused, down).shape[0])
        self.gating = _without(fused, (first, down, f"{first}_bias", f"{down}_bias"))
        for at in range(self.num_experts):
            self.add_module(str(at), nn.ModuleDict({name: _linear(fused, name, at) for name in (first, down)}))
        self.mode: Mode | None = None  # while inputs are collected
        # Past nn.Module.__setattr__: registered, the 3-D parameters would be part of the state dict.
        object.__setattr__(self, "fused", fused)
        if (block := vars(fused).get(BLOCK_MARK)) is not None:
            for module in self.modules():
                object.__setattr__(module, BLOCK_MARK, block)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, H], the experts of each int64 [T, k] and their weights [T, k] -> [T, H].

        An index of `num_experts` or more stands for no expert, as in transformers.
        """
        if self.mode is not None:
            counted = self.mode.rows
            if counted is not None and len(counted) == len(hidden_states):
                top_k_index = top_k_index.masked_fill(~counted.to(top_k_index.device)[:, None], self.num_experts)
            if self.mode.everything:
                return self._everything(hidden_states, top_k_index, top_k_weights)
        tokens, k = top_k_index.shape
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)[: self.num_experts].tolist()
        weights, start, parts = top_k_weights.reshape(-1), 0, []
        for at, count in enumerate(counts):
            if count:
                slots = order[start : start + count]
                parts.append(self._expert(at, hidden_states[slots // k]) * weights[slots, None])
                start += count
        if not parts:
            return torch.zeros_like(hidden_states)
        if start < len(order):
            parts.append(parts[0].new_zeros(len(order) - start, parts[0].shape[-1]))
        # Summed per token in the order of its experts: the same on every device and in every run.
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=order.device)
        return torch.cat(parts)[slots].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    @contextmanager
    def counting(self, everything: bool, rows: Tensor | None) -> Iterator[None]:
        """Inside, it runs as `Mode` says. rows: bool [batch, length], or None."""
        self.mode = Mode(everything, None if rows is None else rows.reshape(-1))
        try:
            yield
        finally:
            self.mode = None

    def layers(self) -> Iterator[nn.Module]:
        """The linear layers of all experts."""
        for at in range(self.num_experts):
            yield from self.projections(at).values()

    def projections(self, at: int) -> dict[str, nn.Module]:
        """The linear layers of one expert by name."""
        return dict(self.get_submodule(str(at)).named_children())

    def renew(self) -> None:
        """View the parameters of `fused` again, which are others now: they were read from a file, or given back."""
        assert self.fused is not None
        for at in range(self.num_experts):
            for name, layer in self.projections(at).items():
                if not isinstance(layer, PackedLinear):
                    layer._parameters.update(_linear(self.fused, name, at)._parameters)
        own = self.gating._parameters
        own.update({name: self.fused._parameters[name] for name in own})

    def difference(self) -> str:
        """How the outputs of `fused` differ; empty if they agree up to rounding (or the weights have no values yet)."""
        return "" if self.fused is None else _difference(self.fused, self)

    def _expert(self, at: int, x: Tensor) -> Tensor:
        """[t, H] -> [t, H], without the token's weight."""
        first, down = self._modules[str(at)]._modules.values()  # type: ignore[union-attr]
        gating = self.gating
        x = first(x)  # type: ignore[misc]
        if hasattr(gating, "_apply_gate") and getattr(gating, "has_gate", True):
            x = gating._apply_gate(x)  # type: ignore[operator]
        elif getattr(gating, "has_gate", True):
            gate, up = x.chunk(2, dim=-1)
            x = gating.act_fn(gate) * up  # type: ignore[operator]
        else:
            x = gating.act_fn(x)  # type: ignore[operator]
        x = down(x)  # type: ignore[misc]
        return gating.post_expert_norm(x) if getattr(gating, "has_post_expert_norm", False) else x  # type: ignore[operator]

    def _everything(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every expert on all tokens that count; the sum of the routed ones. Tokens that do not count get 0."""
        counts = (top_k_index < self.num_experts).any(1)
        x = hidden_states if bool(counts.all()) else hidden_states[counts]
        share = top_k_weights.new_zeros(len(top_k_index), self.num_experts + 1)
        share = share.scatter_add_(1, top_k_index.clamp(max=self.num_experts), top_k_weights)[counts]
        total = sum(self._expert(at, x) * share[:, at, None] for at in range(self.num_experts))
        result = torch.zeros_like(hidden_states)
        result[counts] = total.to(result.dtype)  # type: ignore[union-attr]
        return result


class SortedExperts(Experts):
    """As Llama 4 has them: each expert is given all tokens, scaled by the router, and 0 where it chose another."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[E * T, H] -> [E * T, H], all tokens for expert 0 first; 0 stays 0."""
        x = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        keep = x.any(-1)
        if self.mode is not None:
            if self.mode.everything:
                raise ValueError(
                    f'experts="all": {type(self.gating).__name__} gets its tokens scaled by the router, so that others '
                    "are not known"
                )
            if self.mode.rows is not None and len(self.mode.rows) == x.shape[1]:
                keep &= self.mode.rows.to(keep.device)
        result = torch.zeros_like(x)
        for at, rows in enumerate(keep):
            if len(chosen := rows.nonzero()[:, 0]):
                result[at, chosen] = self._expert(at, x[at, chosen]).to(x.dtype)
        return result.view_as(hidden_states)


def build(fused: nn.Module) -> Experts | str:
    """`Experts` for a module with 3-D parameters, or why there are none: its layout and its forward must be known."""
    described = all(isinstance(getattr(fused, name, None), bool) for name in ("is_transposed", "has_bias"))
    if not described and len(inspect.signature(fused.forward).parameters) != 1:
        return f"3-D weights in a forward that is not known: {type(fused).__name__} does not say how it is laid out"
    first, down = _projections(fused)
    shapes = [list(getattr(getattr(fused, name, None), "shape", ())) for name in (first, down)]
    if any(len(shape) != 3 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        return f"experts need {first} and {down} as [E, ., .], got {shapes[0]} and {shapes[1]}"
    if getattr(fused, "_is_expert_parallel", False):
        return "its experts are spread over several processes"
    try:
        experts = Experts(fused) if described else SortedExperts(fused)
        return _difference(fused, experts) or experts
    except Exception as error:
        return f"its forward does not take tokens, experts and weights: {type(error).__name__}: {error}".split("\n")[0]


@contextmanager
def unfused(model: nn.Module, only: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """Inside, the mixtures of `model` (those whose name `only` accepts) are `Experts`.

    Afterwards a mixture none of whose layers is packed is the fused module that it was.
    """
    _unfuse(model, only)
    try:
        yield
    finally:
        settle(model)


def _unfuse(model: nn.Module, only: Callable[[str], bool]) -> None:
    """A function of its own: nothing but the `Experts` may hold the fused modules while blocks are compressed."""
    new: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if name and only(name) and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            experts = build(module)
            if isinstance(experts, Experts):
                new[module] = experts
    replace(model, new)


def settle(root: nn.Module, busy: Container[nn.Module] = ()) -> None:
    """Put fused modules back where no layer of the `Experts` is packed or among `busy`.

    Elsewhere the 3-D parameters are let go of, and layers that stay dense get memory of their own; where they are
    streamed they are read for it, since files give them in the 3-D parameters alone.
    """
    from llmkern.streaming import held

    back: dict[nn.Module, nn.Module] = {}
    for experts in root.modules():
        if not isinstance(experts, Experts) or experts.fused is None or any(m in busy for m in experts.layers()):
            continue
        if not any(isinstance(layer, PackedLinear) for layer in experts.layers()):
            back[experts] = experts.fused
            continue
        dense = [layer for layer in experts.layers() if isinstance(layer, nn.Linear)]
        with held(experts) if dense else nullcontext():
            object.__setattr__(experts, "fused", None)
            for layer in dense:
                # A parameter that is not the one which was read is not given back.
                weight = layer.weight
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    replace(root, back)


def mixtures(module: nn.Module) -> dict[str, Experts]:
    """The mixtures inside a module by name."""
    return {name: found for name, found in module.named_modules() if isinstance(found, Experts)}


def replace(root: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever they are."""
    if new:
        for parent in list(root.modules()):
            for key, child in parent._modules.items():
                if child in new:
                    parent._modules[key] = new[child]


def _projections(fused: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(fused, "has_gate", True) else "up_proj"), "down_proj"


def _is_transposed(fused: nn.Module) -> bool:
    """Whether the weights are [E, K, N], by what the module says or else by their shapes."""
    first, down = (getattr(fused, name) for name in _projections(fused))
    return bool(getattr(fused, "is_transposed", first.shape[1] == down.shape[2]))


def _linear(fused: nn.Module, name: str, at: int) -> nn.Linear:
    """One expert's projection, a view."""
    whole = getattr(fused, name)
    weight = whole.data[at].T if _is_transposed(fused) else whole.data[at]
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=whole.requires_grad)
    if getattr(fused, "has_bias", False):
        bias = getattr(fused, f"{name}_bias")
        linear.bias = nn.Parameter(bias.data[at], requires_grad=bias.requires_grad)
    return linear.train(fused.training)


def _without(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A shallow copy of a module without these parameters."""
    shell = copy.copy(module)
    shell._parameters = {key: value for key, value in module._parameters.items() if key not in names}
    shell._modules, shell._buffers = dict(module._modules), dict(module._buffers)
    return shell


def _difference(fused: nn.Module, experts: Experts) -> str:
    """Run both on a few tokens; empty if they agree up to rounding (or the weights have no values yet)."""
    first = getattr(fused, _projections(fused)[0])
    if first.is_meta:
        return ""
    count, hidden = first.shape[0], first.shape[1 if experts.transposed else 2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, hidden, generator=generator).to(first)
    index = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(4)]).to(first.device)
    args: tuple[Tensor, ...] = (x, index, torch.rand(index.shape, generator=generator).to(first))
    if isinstance(experts, SortedExperts):
        args = ((x * (torch.arange(count * 4) % 3 > 0).view(count, 4, 1).to(first)).view(-1, hidden),)
    with torch.no_grad():
        wanted, got = fused(*args), experts(*args)
    if not isinstance(wanted, Tensor) or wanted.shape != got.shape:
        return f"its forward returns {getattr(wanted, 'shape', type(wanted).__name__)}, not the tokens' new values"
    error = (wanted.float() - got.float()).norm() / wanted.float().norm().clamp(min=1e-30)
    # Weights that are not finite are for the solver to find, with the layer's name.
    if error > ROUNDING.get(first.dtype, 1e-4):
        return f"its forward is not that of experts as llmkern knows them: the outputs differ by {float(error):.1e}"
    return ""
