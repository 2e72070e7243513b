"""Pruning: masks that survive training, and parts of a model removed so that a smaller dense one remains."""

from __future__ import annotations

from llmkern.prune.depth import keep_blocks
from llmkern.prune.plan import KeptBlock, StructuredPlan
from llmkern.prune.removed import StructuredReport
from llmkern.prune.structured_apply import apply_structured
from llmkern.prune.structured_plan import plan_structured

__all__ = ["KeptBlock", "StructuredPlan", "StructuredReport", "apply_structured", "keep_blocks", "plan_structured"]
