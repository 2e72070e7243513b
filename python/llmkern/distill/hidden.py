"""Losses between the hidden states of a student's and a teacher's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from llmkern.blocks import hidden_state
from llmkern.distill.heads import text_config
from llmkern.prune.rebuild import only_blocks

Pairs = Sequence[tuple[int, int]]


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t), the mean over rows; [R, H] of both, a 0-d fp32 tensor (DistilBERT, arXiv 1910.01108)."""
    return 1 - nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def squarehead(student: Tensor, teacher: Tensor) -> Tensor:
    """mse(s, t) / mean(t²); [R, H] of both, a 0-d fp32 tensor (SquareHead, arXiv 2310.06927)."""
    target = teacher.float()
    scale = target.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return nn.functional.mse_loss(student.float(), target) / scale


KINDS = {"cosine": cosine, "squarehead": squarehead}


class HiddenLoss:
    """The sum of a loss over pairs of blocks, on the blocks' outputs at the tokens that count.

    kind: "cosine" or "squarehead". layers: pairs (student's block, teacher's block), from 0; by default of cosine the
    last two blocks, as DistilBERT has it, and of squarehead each of the student's S blocks with one of the teacher's T,
    evenly: i with (i + 1) T // S - 1.

    The student's outputs are kept for its backward pass anyway; of the teacher those in `layers` are kept besides, from
    its forward until the loss is computed. Raises ValueError for models of different widths, for blocks that are not
    there, and for a model whose blocks are not one list.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, kind: str, layers: Pairs | None) -> None:
        if kind not in KINDS:
            raise ValueError(f"DistillWrapper: hidden must be None or one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        widths = [getattr(text_config(model), "hidden_size", None) for model in (student, teacher)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"DistillWrapper: hidden={kind!r} compares hidden states: the student must be as wide as the teacher "
                f"({widths[1]}), got {widths[0]}"
            )
        mine, theirs = (only_blocks(model, "DistillWrapper")[1] for model in (student, teacher))
        self.pairs = (
            [(int(s), int(t)) for s, t in layers] if layers is not None else _pairs(kind, len(mine), len(theirs))
        )
        if not self.pairs:
            raise ValueError("DistillWrapper: layers must name at least one pair of blocks, got none")
        for s, t in self.pairs:
            if not (0 <= s < len(mine) and 0 <= t < len(theirs)):
                raise ValueError(
                    f"DistillWrapper: layers must be pairs of blocks below ({len(mine)}, {len(theirs)}), got ({s}, {t})"
                )
        self.student = {s: mine[s] for s, _ in self.pairs}
        self.teacher = {t: theirs[t] for _, t in self.pairs}

    def __call__(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], tokens: Tensor) -> Tensor:
        """0-d fp32. student, teacher: outputs [B, L, H] by block; tokens: bool [B, L], at least one of them True."""
        every = bool(tokens.all())
        total = torch.zeros((), device=tokens.device)
        for s, t in self.pairs:
            one, other = student[s], teacher[t]
            if one.shape != other.shape:
                raise ValueError(
                    f"DistillWrapper: hidden={self.kind!r}: block {s} of the student gives {list(one.shape)}, block "
                    f"{t} of the teacher {list(other.shape)}"
                )
            total = total + KINDS[self.kind](*((one, other) if every else (one[tokens], other[tokens])))
        return total


@contextmanager
def outputs_of(blocks: Mapping[int, nn.Module], found: dict[int, Tensor]) -> Iterator[None]:
    """Collect in `found` the hidden states [B, L, H] that blocks hand on, by number.

    Nothing is computed inside the hooks: under gradient checkpointing they may run a second time, and what is computed
    there would have to be again.
    """
    graph = torch.is_grad_enabled()

    def keep(number: int, block: nn.Module, args: tuple, output: object) -> None:
        if graph and not torch.is_grad_enabled():
            raise ValueError(
                "DistillWrapper: hidden losses need gradient checkpointing with use_reentrant=False: the reentrant "
                "kind runs blocks without a graph"
            )
        found[number] = hidden_state(output)

    handles = [block.register_forward_hook(partial(keep, number)) for number, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pairs(kind: str, student: int, teacher: int) -> list[tuple[int, int]]:
    if kind == "cosine":
        return [(student - 1, teacher - 1)]
    return [(i, max((i + 1) * teacher // student - 1, 0)) for i in range(student)]
