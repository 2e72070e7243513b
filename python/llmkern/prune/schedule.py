"""cubic_schedule: how much is pruned at which step of a fine-tuning (Zhu & Gupta, arXiv 1710.01878)."""

from __future__ import annotations


def cubic_schedule(step: int, *, start: int, end: int, initial: float = 0.0, final: float) -> float:
    """The sparsity at a step: `initial` until `start`, `final` from `end` on, and between the two

        final + (initial - final) (1 - (step - start) / (end - start))³

    Much is pruned early, while many weights matter little, and ever less towards the end. Raises ValueError unless
    start < end and 0 <= initial <= final < 1.
    """  # fmt: skip
    if not start < end:
        raise ValueError(f"cubic_schedule: wanted start < end, got start={start!r}, end={end!r}")
    if not 0 <= initial <= final < 1:
        raise ValueError(f"cubic_schedule: wanted 0 <= initial <= final < 1, got initial={initial!r}, final={final!r}")
    if step <= start or step >= end:
        return initial if step <= start else final
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** 3
