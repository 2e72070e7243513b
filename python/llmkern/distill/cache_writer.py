"""How a TeacherCache is written: the teacher's predictions batch by batch, a durable shard at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._progress import Progress
from llmkern._version import __version__
from llmkern.calibration import BATCH, quiet
from llmkern.distill.heads import OutputHead
from llmkern.distill.teacher_cache import CALLER, NOT_READ, keys_of, lengths_of
from llmkern.fingerprint import about_model, digest_of
from llmkern.state import State

WORKSPACE = 64_000_000  # bytes of logits, and of what is computed from them
BYTES = 6  # of an entry: an int32 index and an fp16 log-probability
SEEDS = 1_000_003  # more shards than a cache has: no two caches with other seeds share a shard's draws


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a cache beside the teacher and the data."""

    k: int
    temperature: float
    sample: bool
    seed: int
    classes: int | None
    shard_mb: float


def write(path: Path, teacher: nn.Module, batches: Any, settings: Settings, progress: bool) -> None:
    """See `TeacherCache.write`."""
    head = OutputHead(teacher, "teacher")
    classes = _check(settings, head.classes)
    listed = _listed(batches, teacher)
    groups = _groups(listed, settings)
    fingerprint = {
        "llmkern": __version__,
        "torch": torch.__version__,
        "teacher": about_model(teacher),
        "data": digest_of([[list(batch), list(batch.values())] for batch in listed]),
        "settings": {**asdict(settings), "classes": classes},
        "shards": len(groups),
    }
    head.verify(teacher, listed[0])
    state = State(path, fingerprint, argument=CALLER)
    try:
        bar = Progress("teacher", len(groups), progress)
        for number, group in enumerate(groups):
            if number >= len(state.parts):
                state.write_tensors(f"shard {number}", _shard(teacher, head, group, number, settings, classes))
            bar.step(f"shard {number}")
    finally:
        state.close()


def _check(settings: Settings, there: int) -> int:
    """How many classes count. ValueError for settings that make no sense."""
    classes = there if settings.classes is None else settings.classes
    if not 0 < classes <= there:
        raise ValueError(f"{CALLER}: classes must be 1 to {there}, the teacher's, got {classes}")
    if settings.k < 1 or (not settings.sample and settings.k > classes):
        raise ValueError(f"{CALLER}: k must be 1 to {classes}, the classes, got {settings.k}")
    if not 0 < settings.temperature < math.inf:
        raise ValueError(f"{CALLER}: temperature must be a positive number, got {settings.temperature}")
    if not settings.shard_mb > 0:
        raise ValueError(f"{CALLER}: shard_mb must be positive, got {settings.shard_mb}")
    return classes


def _listed(batches: Any, teacher: nn.Module) -> list[dict[str, Any]]:
    """Batches in any accepted form as calls of the teacher, none of them empty. Raises for what is no such thing."""
    if isinstance(batches, Tensor):
        batches = batches.split(BATCH) if batches.numel() else []
    if not isinstance(batches, Iterable):
        raise TypeError(f"{CALLER}: batches must be token ids [n, L] or an iterable, got {type(batches).__name__}")
    listed = []
    rows = getattr(getattr(teacher, "get_input_embeddings", lambda: None)(), "num_embeddings", math.inf)
    for batch in batches:
        found = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        if not isinstance(found, Mapping) or not isinstance(ids := found.get("input_ids"), Tensor):
            raise TypeError(
                f"{CALLER}: a batch must be token ids or a mapping with input_ids, got {type(batch).__name__}"
            )
        if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"{CALLER}: input_ids must be integers [B, L], B, L > 0, got {ids.dtype} {list(ids.shape)}"
            )
        if not 0 <= ids.min() <= ids.max() < rows:
            raise ValueError(f"{CALLER}: input_ids must be in [0, {rows}), got {int(ids.min())} to {int(ids.max())}")
        mask = found.get("attention_mask")
        if mask is not None and (mask.shape != ids.shape or not (mask != 0).any(1).all()):
            raise ValueError(f"{CALLER}: attention_mask must be {list(ids.shape)} with a token in each sequence")
        kept = {k: v for k, v in found.items() if v is not None and (k == "attention_mask" or k not in NOT_READ)}
        keys_of(kept)  # raises for what has no place in a key
        listed.append(kept)
    if not listed:
        raise ValueError(f"{CALLER}: wanted at least one batch, got none")
    return listed


def _groups(batches: list[dict[str, Any]], settings: Settings) -> list[list[dict[str, Any]]]:
    """The batches of each shard, in order: as many as fit into shard_mb, one at least."""
    groups: list[list[dict[str, Any]]] = []
    left = 0.0
    for batch in batches:
        size = batch["input_ids"].numel() * settings.k * BYTES
        if not groups or size > left:
            groups.append([])
            left = settings.shard_mb * 1e6
        groups[-1].append(batch)
        left -= size
    return groups


def _shard(
    teacher: nn.Module, head: OutputHead, batches: list[dict[str, Any]], number: int, settings: Settings, classes: int
) -> dict[str, Tensor]:
    """The tensors of a shard."""
    device = head.module.weight.device
    generator = torch.Generator(device).manual_seed(settings.seed * SEEDS + number)
    keys, lengths, ids, indices, log_probs = [], [], [], [], []
    for batch in batches:
        keys += keys_of(batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(device)
        length = lengths_of(mask)
        kept = torch.arange(mask.shape[1], device=device) < length[:, None]
        on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.no_grad(), quiet(teacher):
            rows = head.hidden(teacher, on_device)[kept]
            for part in rows.split(_rows_at_once(classes)):
                found = _predictions(head.logits(part.to(head.module.weight.dtype), classes), settings, generator)
                indices.append(found[0])
                log_probs.append(found[1])
        ids.append(on_device["input_ids"].masked_fill(mask == 0, -1)[kept])
        lengths.append(length)
    starts = nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0))
    return {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
        "starts": starts.cpu(),
        "batches": torch.tensor([len(length) for length in lengths]),
        "input_ids": torch.cat(ids).int().cpu(),
        "indices": torch.cat(indices).cpu(),
        "log_probs": torch.cat(log_probs).cpu(),
    }


def _rows_at_once(classes: int) -> int:
    """How many rows' logits fit into the workspace, with their fp32 log-probabilities and probabilities."""
    return max(WORKSPACE // (3 * 4 * classes), 1)


def _predictions(logits: Tensor, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """indices int32 [R, k] and log-probabilities fp16 [R, k] of logits [R, V], the likeliest, or most drawn, first."""
    log_p = torch.log_softmax(logits.float() / settings.temperature, dim=-1)
    if not settings.sample:
        values, indices = log_p.topk(settings.k, dim=-1)
        return indices.int(), values.half()
    draws = torch.multinomial(log_p.exp(), settings.k, replacement=True, generator=generator)
    return counted(draws)


def counted(draws: Tensor) -> tuple[Tensor, Tensor]:
    """indices int32 [R, k] and log(count / k) fp16 [R, k] of draws [R, k]: each class once, the most drawn first.

    What is left over of the k entries has the log-probability -inf, and the row's first class.
    """
    k = draws.shape[1]
    ordered = draws.sort(dim=-1).values
    first = nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    group = first.cumsum(-1) - 1  # of each draw the number of its class in its row
    counts = torch.zeros_like(draws).scatter_add_(1, group, torch.ones_like(draws))
    classes = torch.zeros_like(draws).scatter_(1, group, ordered)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    classes = classes.gather(1, order)
    classes = torch.where(counts > 0, classes, classes[:, :1])
    return classes.int(), (counts.float() / k).log().half()
