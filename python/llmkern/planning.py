"""What `compress` would do to a model, and what it would take, from shapes alone: no weights, no forward."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from llmkern import _memory, blocks, experts
from llmkern._dense import half_is_fast, product
from llmkern.calibration import per_call
from llmkern.fisher import ROWS, TOKENS
from llmkern.nn import dense_weight, is_linear
from llmkern.packed_size import packed_size
from llmkern.patching import choose, tied
from llmkern.recipe import Recipe
from llmkern.report import Skipped, model_bytes
from llmkern.solvers.output import PART
from llmkern.solvers.polish import DESCENT, SCALE_STEPS
from llmkern.solvers.sparsegpt import REFIT_STEPS
from llmkern.stages import kind_of

# [K, K] matrices that a method has at a time, and passes over the [N, K] weight as products with one of them.
MATRICES = {"rtn": 1, "magnitude": 1, "pack": 1, "wanda": 1, "gptq": 3, "sparsegpt": 7}
PRODUCTS = {"rtn": 1, "magnitude": 1, "pack": 0, "wanda": 2, "gptq": 4, "sparsegpt": 8 + 2 * REFIT_STEPS + 48}
WEIGHT_COPIES = 10  # fp32 [N, K] that a solver has at a time: weight, differences, mask, clip search
FORWARD_COPIES = 4  # of a batch's widest activation, and one more where inputs are kept until the forward ends
# What calibration reaches of the rate of a large product, on SmolLM2 (small matrices, norms, attention, packing).
EFFICIENCY = 0.2
# Products with both matrices of coupled rows, exact and rough ones: two refits of scales, and passes over the codes.
POLISH, POLISH_ROUGH = 2 * 2 + 2 * DESCENT, 2 * SCALE_STEPS
ROUGH = 0.5  # of the time of an exact product
# Passes over a block: its stages together about one and a half, and one that feeds the next block; of the dense model
# the last stage is that one.
FORWARDS, DENSE_FORWARDS = 2.5, 1.6
# Bytes: libraries' own buffers, and memory that is free but not given back; 60 to 155 MB on SmolLM2.
RUNTIME = 110_000_000


@dataclass
class Layer:
    """One layer that would be replaced. bytes_after and format are None where the weights themselves decide."""

    name: str
    shape: tuple[int, int]
    method: str
    format: str | None
    bytes_before: int
    bytes_after: int | None


@dataclass
class _Work:
    """Bytes beyond the weights.

    first: of the pass over the dense model that gathers gradients. felt: what is kept of them until a layer's turn
    comes (in `first` already). blocks: beside that, while one block after the other is compressed. hidden: of `blocks`,
    the hidden states between them.
    """

    first: int = 0
    felt: int = 0
    blocks: int = 0
    hidden: int = 0

    def peak(self, weights: int, packed: int = 0) -> int:
        """With these weights, and packed layers that take the place of what is felt as they come."""
        return weights + max(self.first, max(self.felt, packed) + self.blocks)


@dataclass
class Plan:
    """Layers and bytes are exact; memory (beyond what a process with torch and transformers has), disk and time are
    estimates.
    """

    recipe: str
    layers: list[Layer]
    skipped: list[Skipped]
    model_bytes_before: int
    model_bytes_after: int | None
    peak_bytes: int
    peak_bytes_streamed: int | None
    activation_bytes: int
    disk_bytes: int
    seconds: float
    available_bytes: int | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def plan(
    model: nn.Module, recipe: str | Recipe, *, samples: int = 128, seqlen: int = 512, rate: float | None = None
) -> Plan:
    """Plan `compress(model, recipe, token ids [samples, seqlen])`; the model may be on the meta device.

    rate: multiplications per second of a large fp32 product here, measured if None. Raises ValueError as `compress`
    does: a pattern that matches nothing, a group larger than a layer, nothing left to replace.
    """
    recipe = Recipe.parse(recipe)
    before = model_bytes(model)
    with experts.unfused(model):
        return _plan(model, recipe, samples, seqlen, before, rate or measured_rate())


def _plan(model: nn.Module, recipe: Recipe, samples: int, seqlen: int, before: int, rate: float) -> Plan:
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    chosen, skipped = dict.fromkeys(linears, recipe), list[Skipped]()
    if recipe.method != "cast":
        chosen, skipped = choose(model, recipe, "plan")
    layers, file_bytes = [], 0
    for name, wanted in chosen.items():
        weight = dense_weight(linears[name])
        shape = (weight.shape[0], weight.shape[1])
        size = packed_size(shape, wanted, weight.dtype)
        file_bytes += size.file_bytes
        layers.append(Layer(name, shape, str(wanted), size.format, weight.nbytes, size.nbytes))
    # A head that shares the weight of the embeddings leaves it to them.
    stay = tied(model, {layer.name: linears[layer.name] for layer in layers})
    dense = sum(layer.bytes_before for layer in layers if layer.name not in stay)
    packed = None if any(layer.bytes_after is None for layer in layers) else sum(x.bytes_after or 0 for x in layers)
    tokens = samples * seqlen if any(wanted.needs_calibration for wanted in chosen.values()) else 0
    work = _work(model, chosen, linears, samples, seqlen) if recipe.method != "cast" else _Work()
    inside = _block_bytes(model)
    outside = before - sum(inside) + max(inside, default=0)
    after = None if packed is None else before - dense + packed
    if recipe.method == "cast":
        after, file_bytes, dense = _cast_bytes(model, recipe), _cast_bytes(model, recipe), before
    made = Plan(
        recipe=str(recipe),
        layers=layers,
        skipped=skipped,
        model_bytes_before=before,
        model_bytes_after=after,
        peak_bytes=work.peak(before) + (after or 0 if recipe.method == "cast" else 0),
        peak_bytes_streamed=(
            work.peak(outside, dense if packed is None else packed) if inside and recipe.method != "cast" else None
        ),
        activation_bytes=work.hidden,
        disk_bytes=before - dense + file_bytes,
        seconds=_operations(chosen, linears, tokens) / (rate * EFFICIENCY),
        available_bytes=_memory.available(),
    )
    _remark(made)
    return made


def measured_rate() -> float:
    """Multiplications per second of a [1024, 1024] fp32 product, the best of a few: a tenth of a second."""
    a = torch.rand(1024, 1024)
    product(a, a)
    best = 1.0
    for _ in range(4):
        start = time.perf_counter()
        product(a, a)
        best = min(best, time.perf_counter() - start)
    return 1024**3 / best


def _work(
    model: nn.Module, chosen: dict[str, Recipe], linears: dict[str, nn.Module], samples: int, seqlen: int
) -> _Work:
    """For calibration on `samples` sequences."""
    shapes = {name: dense_weight(linears[name]) for name in chosen}
    solver = max(4 * WEIGHT_COPIES * weight.numel() for weight in shapes.values())
    solver += max(4 * MATRICES[chosen[name].method] * weight.shape[1] ** 2 for name, weight in shapes.items())
    if not any(wanted.needs_calibration for wanted in chosen.values()):
        return _Work(blocks=solver + RUNTIME)
    item = next(iter(shapes.values())).element_size()
    prefixes = [name for name, _ in blocks.named(model)]
    inside = [weight for name, weight in shapes.items() if any(name.startswith(f"{prefix}.") for prefix in prefixes)]
    width = min((min(weight.shape[1], weight.shape[0]) for weight in inside), default=0)
    width = getattr(getattr(model, "config", None), "hidden_size", None) or width
    hidden = samples * seqlen * width * item
    widest = max(max(weight.shape) for weight in shapes.values())
    corrected = {name: weight for name, weight in shapes.items() if chosen[name].correction}
    if corrected:
        hidden *= 2  # the dense model's beside the compressed one's
        solver += _correction(corrected, prefixes)
    felt = {name: weight.shape for name, weight in shapes.items() if chosen[name].by_model}
    tokens = min(per_call(seqlen, torch.device("cpu")), samples) * seqlen
    forward = tokens * widest * item * (FORWARD_COPIES + bool(felt or corrected))
    work = _Work(blocks=hidden + forward + solver + RUNTIME, hidden=hidden)
    if felt:
        outputs = sum(4 * (n // PART * PART**2 + (n % PART) ** 2) for n, _ in felt.values())
        work.felt = outputs + 4 * samples * seqlen * len(felt)
        work.first = work.felt + _gradients(model, max(seqlen, min(TOKENS, samples * seqlen)), width, item)
    return work


def _correction(weights: dict[str, torch.Tensor], prefixes: list[str]) -> int:
    """Bytes of correcting these layers: a block's dense weights, what differs in an input, a factor, and the new weight
    in the making.
    """
    inside = [sum(w.nbytes for name, w in weights.items() if name.startswith(f"{block}.")) for block in prefixes]
    matrices = max(8 * weight.shape[1] ** 2 for weight in weights.values())
    return max(inside, default=0) + matrices + max(12 * weight.numel() for weight in weights.values())


def _gradients(model: nn.Module, tokens: int, width: int, item: int) -> int:
    """Bytes that one forward and backward pass takes, which keeps the inputs of blocks alone."""
    rows = max((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), default=0)
    logits = tokens * rows * (8 if item == 4 else item + 8)  # with their gradient, in the making fp32 on both sides
    drawn = 2 * 4 * ROWS * rows  # sums of a part of the distribution, and of the part before
    inputs = tokens * width * item * len(blocks.named(model))
    # A block's values and their gradients.
    routed = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    again = max((_numbers(block, routed) for _, block in blocks.named(model)), default=0)
    return logits + inputs + max(drawn, 2 * tokens * again * item) + RUNTIME


def _numbers(block: nn.Module, routed: int | None) -> int:
    """What goes into and out of a block's layers per token, which `routed` experts see."""
    kinds: dict[str, list[int]] = {}
    for name, module in block.named_modules():
        if is_linear(module):
            kinds.setdefault(kind_of(name), []).append(sum(dense_weight(module).shape))
    return sum(sum(sizes[:routed]) for sizes in kinds.values())


def _operations(chosen: dict[str, Recipe], linears: dict[str, nn.Module], tokens: int) -> float:
    """Multiplications. Layers of one parent and one K are taken to share their input, as q, k and v do."""
    inputs: dict[tuple[str, int], set[str]] = {}
    corrected: set[tuple[str, int]] = set()
    count, rough = 0.0, ROUGH if half_is_fast() else 1.0
    for name, wanted in chosen.items():
        n, k = dense_weight(linears[name]).shape
        inputs.setdefault((name.rpartition(".")[0], k), set()).add(wanted.method)
        count += PRODUCTS.get(wanted.method, 1) * n * k * k / 2 * bool(tokens) + 100 * n * k
        count += rough * FORWARDS * tokens * n * k
        if wanted.correction and tokens:
            corrected.add((name.rpartition(".")[0], k))
            count += rough * DENSE_FORWARDS * tokens * n * k + 2 * n * k * k
        if wanted.by_model:  # forward, once more in the backward pass, and back
            count += rough * tokens * n * (3 * k + min(n, PART) / 2)
            if wanted.bits:  # in products as large as they get
                count += EFFICIENCY * (POLISH + rough * POLISH_ROUGH) * n * k * (k + min(n, PART))
    for (parent, k), methods in inputs.items():
        if (parent, k) in corrected:
            count += rough * tokens * k * k + k**3 / 3
        eigen = 10 if "sparsegpt" in methods else 0
        count += tokens * k * k / 2 + (len(methods) + eigen) * k**3 / 3 * bool(tokens)
    return count


def _block_bytes(model: nn.Module) -> list[int]:
    return [sum(parameter.nbytes for parameter in block.parameters()) for _, block in blocks.named(model)]


def _cast_bytes(model: nn.Module, recipe: Recipe) -> int:
    item = getattr(torch, str(recipe.dtype)).itemsize
    computed = {id(m._buffers[key]) for m in model.modules() for key in m._non_persistent_buffers_set}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(
        t.numel() * item if t.is_floating_point() and key not in computed else t.nbytes for key, t in tensors.items()
    )


def _remark(made: Plan) -> None:
    if made.model_bytes_after is None:
        made.notes.append("which format holds a layer depends on its weights: bytes after are not known")
    if made.available_bytes is not None and made.peak_bytes > made.available_bytes:
        fits = made.peak_bytes_streamed is not None and made.peak_bytes_streamed <= made.available_bytes
        way = "with --stream on it should fit" if fits else "nor does a streamed run; use fewer samples or a larger one"
        made.notes.append(f"more than the {made.available_bytes / 1e9:.1f} GB that are available here: {way}")
