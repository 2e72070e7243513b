"""plan_structured: what to remove from a model, decided on calibration data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from llmkern import fingerprint
from llmkern._progress import Progress
from llmkern.activations import Store
from llmkern.calibration import Calibration
from llmkern.nn import dense_weight
from llmkern.prune import rebuild, walk
from llmkern.prune.durable import Durable
from llmkern.prune.parts import Part
from llmkern.prune.plan import KeptBlock, StructuredPlan
from llmkern.prune.selection import METHODS, Costs, choose, costs
from llmkern.prune.sizes import Sizes, sizes
from llmkern.solvers import Hessian

CALLER = "plan_structured"


def plan_structured(
    model: nn.Module, calibration: Calibration | None = None, *, mlp: float | None = None,
    kv_groups: float | None = None, heads: float | None = None, blocks: float | None = None, method: str = "obs",
    multiple_of: int = 64, damp: float = 0.01, progress: bool = True, activation_budget: int | None = None,
    state_dir: str | Path | None = None,
) -> StructuredPlan:  # fmt: skip
    """Choose the MLP channels, heads and blocks of `model` that stay, for `apply_structured`. The model stays as it is.

    model: a transformers decoder or encoder with one list of blocks, loaded whole on one device. calibration: as for
    `llmkern.compress`; None is enough for `method="magnitude"` without `blocks`. What to keep is a float, the share in
    (0, 1), or an int, the number, less than there are:

    mlp: the channels of every MLP (`intermediate_size`). A share is rounded up to a multiple of `multiple_of`, which a
    number must be. kv_groups: key-value heads, each with the query heads that share it. heads: query heads in all, as
    many of each key-value head that stays (a share is one of these); without grouped heads it is the same as
    `kv_groups`. blocks: whole blocks, those whose input and output differ most in direction, 1 - cos (block influence,
    ShortGPT, arXiv 2403.03853). These shares are rounded up. Sizes are the same in every block, which is what stock
    classes can be.

    method: "obs", "wanda" or "magnitude", see `llmkern.prune.selection`. damp: what obs adds to the diagonal of the
    Hessian, relative to its mean. activation_budget: as for `compress`. state_dir: a folder in which what was
    chosen of every finished block is kept; the same call goes on from there to the same plan. By weights alone a plan
    is made at once, and nothing is kept.

    Raises before any work starts. ValueError: nothing to remove, a share or number that is out of range or no multiple,
    an MLP or attention that is not recognised (a mixture of experts), heads that do not divide, a model whose
    configuration cannot say what would be removed (fewer heads of GPT-2, BERT or OPT), no calibration, the state of
    another run. TypeError: no transformers model, or a size of another type. And what `llmkern.state.State` raises.
    """
    if method not in METHODS:
        raise ValueError(f"{CALLER}: method must be one of {', '.join(METHODS)}, got {method!r}")
    if not damp > 0:
        raise ValueError(f"{CALLER}: damp must be > 0, got {damp}")
    rebuild.refuse_unless_dense(model, CALLER)
    wanted = sizes(
        model, mlp=mlp, kv_groups=kv_groups, heads=heads, blocks=blocks, multiple_of=multiple_of, caller=CALLER
    )
    wanted.cut(wanted.first()).skeleton(CALLER)
    choice, about = _Choice(wanted, method, damp), fingerprint.about_model(model)
    if choice.needs_data or calibration is not None:
        asked = {
            "mlp": mlp, "kv_groups": kv_groups, "heads": heads, "blocks": blocks, "method": method,
            "multiple_of": multiple_of, "damp": damp,
        }  # fmt: skip
        with walk.calm(model), Store(activation_budget) as hidden:
            path = walk.Walk(model, calibration, CALLER)
            with Durable(state_dir, path, {"model": about, "plan": asked}) as kept:
                choice.on_data(path, hidden, kept, progress)
    else:
        choice.by_weights()
    cut = wanted.cut(choice.kept())
    cut.skeleton(CALLER)
    return StructuredPlan(
        method, about, cut.changes(), cut.kept,
        channel_reader=wanted.mlp.reader if wanted.mlp else None,
        head_reader=wanted.attention.reader if wanted.attention else None,
        influence=tuple(choice.influence),
    )  # fmt: skip


class _Choice:
    """The units that stay of every block seen so far, and how much each block does."""

    def __init__(self, wanted: Sizes, method: str, damp: float) -> None:
        self.wanted, self.method, self.damp = wanted, method, damp
        self.channels: list[tuple[int, ...] | None] = []
        self.heads: list[tuple[int, ...] | None] = []
        self.influence: list[float] = []

    @property
    def needs_data(self) -> bool:
        """Whether weights alone cannot decide."""
        return self.method != "magnitude" or self.wanted.blocks < self.wanted.count

    def by_weights(self) -> None:
        """See all blocks, by magnitude."""
        for block in self.wanted.all_blocks():
            self._see(block, {})

    def on_data(self, walk_: walk.Walk, hidden: Store, kept: Durable, progress: bool) -> None:
        """See all blocks that are not kept already, each on what the dense model hands it."""
        bar = Progress(f"{CALLER} {self.method}", self.wanted.count, progress)
        if kept.done < self.wanted.count:
            walk_.enter(hidden)
        for k, block in enumerate(self.wanted.all_blocks()):
            if k < kept.done:
                self._recall(kept.read(k))
                if kept.done < self.wanted.count:
                    walk_.hand_on(k, block, hidden)
            else:
                self._see(block, self._gather(walk_, k, block, hidden))
                kept.write(k, self._to_keep())
            bar.step(f"{self.wanted.name}.{k}")

    def _gather(self, walk_: walk.Walk, k: int, block: nn.Module, hidden: Store) -> dict[str, Hessian]:
        """Run block k, note its influence, and take the moments of what is to get narrower."""
        readers = [part.reader for part in self._parts()] if self.method != "magnitude" else []
        hessians: dict[str, Hessian] = {}
        cosines = count = 0.0
        for at, call in enumerate(walk_.calls(k, hidden)):
            output, seen = walk.run(block, call, {name: block.get_submodule(name) for name in readers})
            for name, (x, _) in seen.items():
                tokens = walk_.counted(at, x)
                if name not in hessians:
                    hessians[name] = Hessian(tokens.shape[-1], tokens.device)
                try:
                    hessians[name].add(tokens)
                except ValueError as error:
                    raise ValueError(f"{CALLER}: the input of {walk_.name}.{k}.{name}: {error}") from None
            before, after = walk_.counted(at, walk_.state(at, hidden)), walk_.counted(at, output)
            cosines += float(nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).sum())
            count += len(before)
            hidden.put(at, output)
        self.influence.append(1 - cosines / count)
        return hessians

    def _to_keep(self) -> dict[str, Tensor]:
        """What was found for the last block, as tensors."""
        found = {"influence": torch.tensor(self.influence[-1], dtype=torch.float64)}
        for name, units in (("channels", self.channels[-1]), ("heads", self.heads[-1])):
            if units is not None:
                found[name] = torch.tensor(units)
        return found

    def _recall(self, found: dict[str, Tensor]) -> None:
        """What `_to_keep` gave of the next block."""
        self.influence.append(float(found["influence"]))
        for name, all_units in (("channels", self.channels), ("heads", self.heads)):
            all_units.append(tuple(found[name].tolist()) if name in found else None)

    def kept(self) -> list[KeptBlock]:
        """The blocks that stay, with their units."""
        order = sorted(range(self.wanted.count), key=lambda k: -self.influence[k] if self.influence else k)
        stay = sorted(order[: self.wanted.blocks])
        return [KeptBlock(f"{self.wanted.name}.{k}", self.channels[k], self.heads[k]) for k in stay]

    def _parts(self) -> list[Part]:
        return [part for part in (self.wanted.attention, self.wanted.mlp) if part is not None]

    def _see(self, block: nn.Module, hessians: dict[str, Hessian]) -> None:
        wanted = self.wanted
        self.channels.append(None)
        self.heads.append(None)
        if wanted.mlp is not None and wanted.channels:
            found = self._costs(block, wanted.mlp, hessians)
            self.channels[-1] = tuple(choose(found, list(range(wanted.mlp.units)), 1, wanted.channels))
        if (part := wanted.attention) is not None and wanted.kv_heads and wanted.heads_per_kv:
            found = self._costs(block, part, hessians)
            groups = choose(found, list(range(part.units // part.shared)), part.unit * part.shared, wanted.kv_heads)
            heads = [group * part.shared + head for group in groups for head in range(part.shared)]
            self.heads[-1] = tuple(choose(found, heads, part.unit, wanted.heads_per_kv, per=part.shared))

    def _costs(self, block: nn.Module, part: Part, hessians: dict[str, Hessian]) -> Costs:
        weight = dense_weight(block.get_submodule(part.reader))
        return costs(self.method, weight, hessians.get(part.reader), part.written(block), self.damp)
