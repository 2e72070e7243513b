"""apply_structured: the smaller model of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from llmkern import fingerprint
from llmkern.activations import Store
from llmkern.calibration import Calibration
from llmkern.prune import rebuild
from llmkern.prune.durable import Durable
from llmkern.prune.narrow import planned
from llmkern.prune.plan import StructuredPlan
from llmkern.prune.removed import StructuredReport
from llmkern.prune.restoration import Restoration
from llmkern.prune.walk import Walk, calm

CALLER = "apply_structured"


def apply_structured(
    model: nn.Module, plan: StructuredPlan, *, calibration: Calibration | None = None, restore: str = "ls",
    damp: float = 0.1, progress: bool = True, activation_budget: int | None = None,
    report: StructuredReport | None = None, state_dir: str | Path | None = None,
) -> Any:  # fmt: skip
    """The smaller dense model of `plan`: of the same class, for `save_pretrained` and stock `from_pretrained`.

    model: the one that the plan was made of; it is not changed. calibration: as for `llmkern.compress`.

    restore="ls": block by block, on inputs from the already restored blocks, the layers that read what was removed
    (`down_proj`, `o_proj`) get the weights with which they come closest to what they give in the dense block on the
    same inputs, by least squares: with X_K what they still read and E what is missing, W'_K = W_K + E X_Kᵀ
    (X_K X_Kᵀ + λ)⁻¹, λ = damp * mean(diag X_K X_Kᵀ). A bias, where the layer has one, is fitted too. Where blocks were
    removed, the MLP of the block before them makes up for them in the same way; a warning says where nothing can (no
    block before, a mixture of experts, a norm after the MLP). restore="none" leaves what remains as it was, for
    comparison.
    activation_budget: as for `compress`. report: filled with what was removed and the errors. state_dir: a folder in
    which every restored block is kept; the same call goes on from there, to the same bits.

    Raises before any work starts. ValueError: a plan for another model, a plan that does not fit the model, no
    calibration for "ls", another `restore`, a damp that is not positive, the state of another run. TypeError: what is
    no plan, or no transformers model. And what `llmkern.state.State` raises.
    """
    if not isinstance(plan, StructuredPlan):
        raise TypeError(f"{CALLER}: plan must be a StructuredPlan, got {type(plan).__name__}")
    if restore not in ("ls", "none"):
        raise ValueError(f'{CALLER}: restore must be "ls" or "none", got {restore!r}')
    if not damp > 0:
        raise ValueError(f"{CALLER}: damp must be > 0, got {damp}")
    rebuild.refuse_unless_dense(model, CALLER)
    if found := fingerprint.differences(dict(plan.model), fingerprint.about_model(model)):
        raise ValueError(f"{CALLER}: the plan is for another model: {'; '.join(found)}")
    cut = planned(model, plan, CALLER)
    small, walk = cut.skeleton(CALLER), None
    if calibration is not None or restore == "ls":
        with calm(model):
            walk = Walk(model, calibration, CALLER)
    rebuild.fill(small, model, cut.tensors())
    report = StructuredReport() if report is None else report
    if walk is not None:
        about = {"plan": fingerprint.digest_of(plan.to_json()), "model": plan.model, "damp": damp}
        with calm(model, small), Store(activation_budget) as hidden:
            walk.enter(hidden)
            restoration = Restoration(cut, small, walk, hidden, report)
            if restore == "ls":
                with Durable(state_dir, walk, about) as durable:
                    restoration.run(damp, durable, progress)
            else:
                restoration.describe()
    kept = set(cut.indices)
    report.blocks_removed = [f"{cut.name}.{k}" for k in range(len(cut.all_blocks())) if k not in kept]
    report.parameters_before, report.parameters_after = (
        sum(value.numel() for value in of.parameters()) for of in (model, small)
    )
    return small
