"""Pruning: masks that survive training, and parts of a model removed so that a smaller dense one remains."""

from __future__ import annotations

from llmkern.prune.depth import keep_blocks

__all__ = ["keep_blocks"]
