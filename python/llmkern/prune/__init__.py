"""Pruning of models: by magnitude, masks that survive training, schedules.

masks = magnitude_(model, "2:4")       # or MaskSet.from_model(model) of a model that is pruned already
masks.attach(optimizer)                # from now on its zeros stay zeros, whatever the optimizer does
"""

from llmkern.prune.magnitude import magnitude_
from llmkern.prune.masks import MaskSet
from llmkern.prune.schedule import cubic_schedule

__all__ = ["MaskSet", "cubic_schedule", "magnitude_"]
