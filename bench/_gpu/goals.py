"""What the GPU kernels must reach on an H100, as data, judged by the rows of a run (llmkern_cli._bench.goals)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench._gpu.plan import GOAL_SHAPES, MS
from llmkern_cli._bench.candidate import KEPT, PER_ROW
from llmkern_cli._bench.goals import Goal, Row, cells, judge

COLUMNS = ((1, 2, 4, 8, 16), (64, 128), (1024, 4096))  # of M, as in the goals
PEER_COLUMNS = tuple((m,) for m in MS)
LEAST = 4096 * 14336  # weights of the smallest shape that is asked
SHAPES_ASKED = 4  # of the five shapes, where a peer is to be equalled

DENSE = {"op": "linear", "peer": "torch.dense"}
FLOATS = ("bfloat16", "float16")


def _by_m(few: float, some: float, many: float) -> dict[int, float]:
    return {m: wanted for ms, wanted in zip(COLUMNS, (few, some, many), strict=True) for m in ms}


def _goal(name: str, ours: dict[str, Any], wanted: tuple[float, float, float]) -> Goal:
    return Goal(f"{name} against torch's dense", ours, DENSE, _by_m(*wanted), same_dtype=True, least=LEAST)


OURS: dict[str, dict[str, Any]] = {
    "int4 g128": {"op": "int4_linear", "activations": KEPT},
    "int8": {"op": "int8_linear"},
    "int8 dynamic": {"op": "int8_dynamic_linear", "activations": PER_ROW},
    "sparse24": {"op": "sparse24_linear"},
    "sparse24 int4": {"op": "sparse24_int4_linear"},
}
GOALS = (
    _goal("int4 g128", OURS["int4 g128"], (3.3, 1.8, 0.95)),
    _goal("int8", OURS["int8"], (1.75, 1.4, 0.95)),
    _goal("int8 dynamic", OURS["int8 dynamic"], (1.75, 1.5, 1.5)),
    _goal("sparse24", OURS["sparse24"], (1.6, 1.3, 1.5)),
    Goal(
        "sparse24 against cuSPARSELt", OURS["sparse24"], {"op": "sparse24_linear", "peer": "torch."},
        dict.fromkeys(COLUMNS[2], 1.0), same_dtype=True, least=LEAST,
    ),
    _goal("sparse24 int4", OURS["sparse24 int4"], (4.2, 2.0, 1.0)),
)  # fmt: skip
PEER_GOALS = tuple(
    Goal(f"{name} against every peer", ours, {**ours, "peer": True}, dict.fromkeys(MS, 1.0), same_dtype=True,
         least=LEAST)
    for name, ours in OURS.items()
)  # fmt: skip


def judged(rows: Sequence[Row], limits: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per goal, shape and M. Only what runs unforced counts as ours."""
    return judge([row for row in rows if not row.get("forced")], limits, (*GOALS, *PEER_GOALS))


def lines(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The goals' table: per goal and column of M the worst shape."""
    names = {goal.name for goal in GOALS}
    return cells([entry for entry in entries if entry["goal"] in names], COLUMNS)


def peer_lines(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Per goal against peers and M: at how many of the shapes measured it is met, and the worst ratio."""
    found = []
    for goal in PEER_GOALS:
        line = [goal.name]
        for m in MS:
            here = [entry for entry in entries if entry["goal"] == goal.name and entry["m"] == m]
            if not here:
                line.append("-")
                continue
            met, worst = sum(entry["met"] for entry in here), min(here, key=lambda entry: entry["measured"])
            # Shapes that were not reached are not met.
            verdict = "met" if met >= SHAPES_ASKED else "not met"
            line.append(
                f"{verdict} ({met} of {len(GOAL_SHAPES)}): worst {worst['measured']:.2f} ({worst['n']}x{worst['k']}, "
                f"{worst['against']})"
            )
        found.append(line)
    return found
