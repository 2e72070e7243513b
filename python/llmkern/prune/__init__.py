"""Pruning: weights set to 0 by magnitude and masks that survive training, or parts of a model removed altogether.

    masks = magnitude_(model, "2:4")       # or MaskSet.from_model(model) of a model that is pruned already
    masks.attach(optimizer)                # from now on its zeros stay zeros, whatever the optimizer does

    plan = plan_structured(model, calibration, mlp=0.75)
    small = apply_structured(model, plan, calibration=calibration)      # dense, for stock transformers
"""  # fmt: skip

from __future__ import annotations

from llmkern.prune.depth import keep_blocks
from llmkern.prune.magnitude import magnitude_
from llmkern.prune.masks import MaskSet
from llmkern.prune.plan import KeptBlock, StructuredPlan
from llmkern.prune.removed import StructuredReport
from llmkern.prune.schedule import cubic_schedule
from llmkern.prune.structured_apply import apply_structured
from llmkern.prune.structured_plan import plan_structured

__all__ = [
    "KeptBlock",
    "MaskSet",
    "StructuredPlan",
    "StructuredReport",
    "apply_structured",
    "cubic_schedule",
    "keep_blocks",
    "magnitude_",
    "plan_structured",
]
