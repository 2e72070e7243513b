"""What structured pruning removed, and what that did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Removed:
    """What was removed before one layer, by its name in the smaller model, and what that did to its output.

    kept of total units: channels or heads. blocks: removed ones for which the layer makes up too. error_before,
    error_after: squared, on the calibration, relative to the squared output that is wanted; None where nothing was
    restored.
    """

    layer: str
    what: str
    kept: int
    total: int
    blocks: tuple[str, ...] = ()
    error_before: float | None = None
    error_after: float | None = None
    notes: tuple[str, ...] = ()


@dataclass
class StructuredReport:
    """What `apply_structured` did, for those who hand one in."""

    rows: list[Removed] = field(default_factory=list)
    blocks_removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)
