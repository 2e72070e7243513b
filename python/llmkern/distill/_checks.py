"""What DistillWrapper refuses before it does anything."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.distill.teacher_cache import TeacherCache
from llmkern.ops.linear_kl_div.reference import KINDS


def tokens_of(ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """bool [B, L], False for padding. ValueError for an empty batch or shapes that do not fit."""
    if ids is None or ids.ndim != 2 or not ids.numel():
        got = "none" if ids is None else list(ids.shape)
        raise ValueError(f"DistillWrapper: a batch must have input_ids [B, L] with B, L > 0, got {got}")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"DistillWrapper: attention_mask must be {list(ids.shape)} as input_ids, got {list(mask.shape)}"
        )
    return mask.bool()


def check_numbers(kind: str, temperature: float, ce_weight: float, hidden_weight: float) -> None:
    """ValueError for a kind that there is not, or numbers out of their range."""
    if kind not in KINDS:
        raise ValueError(f"DistillWrapper: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"DistillWrapper: temperature must be a positive number, got {temperature}")
    for label, weight in (("ce_weight", ce_weight), ("hidden_weight", hidden_weight)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"DistillWrapper: {label} must be 0 or a positive number, got {weight}")


def check_cache(cache: TeacherCache, kind: str, temperature: float, hidden: str | None) -> None:
    """ValueError for what a cache cannot serve."""
    if kind != "forward_kl":
        raise ValueError(f'DistillWrapper: with a cache the kind must be "forward_kl", got {kind!r}')
    if hidden is not None:
        raise ValueError(f"DistillWrapper: hidden={hidden!r} needs the teacher itself: a cache has no hidden states")
    if temperature != cache.temperature:
        raise ValueError(f"DistillWrapper: temperature must be the cache's, {cache.temperature}, got {temperature}")
