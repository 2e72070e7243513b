"""Report: what happened to every linear layer of a model, and what did not and why."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkern._version import __version__


@dataclass
class Row:
    """One replaced layer.

    shape (N, K); kernel: the registry row that runs a single token here; loss: tr((W-Q)H(W-Q)ᵀ)/tr(WHWᵀ), or
    ‖W-Q‖²/‖W‖² when a note says that there was no Hessian, None when nothing was approximated; seconds: of the solver;
    bytes of the weight without bias; damp relative to mean(diag H); notes: facts about the result; problems: what was
    not as it should be (data, numbers, scales), which `compress(strict=True)` refuses.
    """

    name: str
    shape: tuple[int, int]
    method: str
    kernel: str
    loss: float | None
    seconds: float
    bytes_before: int
    bytes_after: int
    damp: float | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass
class Skipped:
    """One linear layer left as it was."""

    name: str
    reason: str
    bytes: int


@dataclass
class Report:
    """The result of `compress` or `patch`."""

    recipe: str
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    tokens: int = 0
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the replaced layers, and their share of all linear weights."""
        before = sum(row.bytes_before for row in self.rows)
        after = sum(row.bytes_after for row in self.rows)
        whole = before + sum(skip.bytes for skip in self.skipped)
        losses = [row.loss for row in self.rows if row.loss is not None]
        return {
            "layers": len(self.rows),
            "skipped": len(self.skipped),
            "linear_bytes_before": before,
            "linear_bytes_after": after,
            "ratio": before / after if after else None,
            "coverage": before / whole if whole else 0.0,
            "mean_loss": sum(losses) / len(losses) if losses else None,
            "solver_seconds": sum(row.seconds for row in self.rows),
            "problems": sum(len(row.problems) for row in self.rows),
        }

    @property
    def problems(self) -> dict[str, tuple[str, ...]]:
        """What was not as it should be, by layer."""
        return {row.name: row.problems for row in self.rows if row.problems}

    def annotate(self, notes: Mapping[str, Sequence[str]]) -> None:
        """Add notes to rows by their names."""
        for row in self.rows:
            row.notes = (*row.notes, *notes.get(row.name, ()))

    def note_few_tokens(self) -> None:
        """Say how many layers saw fewer tokens than they have input features: their Hessian is not of full rank."""
        few = [row for row in self.rows if 0 < row.tokens < row.shape[1]]
        if few:
            worst = min(few, key=lambda row: row.tokens / row.shape[1])
            self.notes.append(
                f"{len(few)} layers saw fewer calibration tokens than they have input features, {worst.name} only "
                f'{worst.tokens} for {worst.shape[1]}: give more data (experts: or all tokens, experts="all")'
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what `to_json` writes. A loss that is not finite becomes None."""
        data = asdict(self)
        for row in data["rows"]:
            if row["loss"] is not None and not math.isfinite(row["loss"]):
                row["loss"] = None
        return {"totals": self.totals, **data}

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to `path` too if one is given."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page (no scripts, nothing fetched); written to `path` too if one is given."""
        from llmkern.report_html import render

        text = render(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        """A few lines for a terminal."""
        sums = self.totals
        ratio = f", {sums['ratio']:.2f} times smaller" if sums["ratio"] else ""
        lines = [
            f"{self.recipe}: {sums['layers']} linear layers in {self.seconds:.1f} s, "
            f"{sums['coverage']:.0%} of the bytes of all linear weights",
            f"linear weights {human(sums['linear_bytes_before'])} -> {human(sums['linear_bytes_after'])}{ratio}",
        ]
        lines += [f"left as it was: {skip.name}: {skip.reason}" for skip in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"... and {len(self.skipped) - 10} more")
        lines += self.problem_lines()
        return "\n".join([*lines, *self.notes])

    def problem_lines(self, most: int = 10) -> list[str]:
        """A line for each problem, with the layers that have it."""
        layers: dict[str, list[str]] = {}
        for name, problems in self.problems.items():
            for problem in problems:
                layers.setdefault(problem, []).append(name)
        lines = [
            f"problem: {names[0]}{f' and {len(names) - 1} more layers' if len(names) > 1 else ''}: {problem}"
            for problem, names in layers.items()
        ]
        return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more problems"]


def human(size: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.3g} GB"


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].strip() if models else name
    return {"cpu": name, "system": platform.platform(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of what took part."""
    return {"llmkern": __version__, "torch": torch.__version__, "python": platform.python_version()}


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, those that are shared counted once."""
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[tensor.data_ptr() if tensor.device.type != "meta" else id(tensor), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())
