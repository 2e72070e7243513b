"""Distillation: losses whose logits are never held whole."""

from llmkern.ops import DistillLoss, linear_kl_div, linear_kl_div_topk

__all__ = ["DistillLoss", "linear_kl_div", "linear_kl_div_topk"]
