"""What the kernels must reach, as data, and whether the rows of a run do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llmkern_cli._bench.candidate import KEPT, PER_GROUP, PER_ROW

Row = dict[str, Any]
COLUMNS = ((1,), (4, 16), (64, 256, 512))
LARGE = 4096 * 4096  # weights, from which on a shape is a large one
# Shares of the machine's limit from which on a goal is out of reach: of the limit itself, and of what kernels get.
OUT_OF_REACH = (1.0, 0.9)


class Goal(NamedTuple):
    """`ours` and `theirs` choose rows (key -> value; peer=True is any peer, a text is what its name starts with).

    ratio: M -> how many times faster than the best of `theirs` at the same shape. read, peak: M -> share of the read
    bandwidth at the large shapes, and of the machine's best multiply-add peak for `factors`. large_only: the Ms whose
    ratio is asked at the large shapes only. same_dtype: compared per dtype of x, not best with best. least: weights
    N * K from which on a shape is asked.
    """

    name: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    ratio: dict[int, float]
    read: dict[int, float] = {}  # noqa: RUF012 - never changed
    peak: dict[int, float] = {}  # noqa: RUF012
    factors: str = "int8"
    large_only: tuple[int, ...] = ()
    same_dtype: bool = False
    least: int = 0


def _by_m(one: float, few: tuple[float, float], many: float) -> dict[int, float]:
    return {1: one, 4: few[0], 16: few[1], 64: many, 256: many, 512: many}


GOALS = (
    Goal(
        "int4, activations int8 per group",
        {"op": "int4_linear", "activations": PER_GROUP},
        {"op": "int4_linear", "activations": PER_GROUP, "peer": True},
        _by_m(1.1, (1.5, 2), 2), read={1: 0.85}, peak={512: 0.35},
    ),
    Goal(
        "int4, activations kept",
        {"op": "int4_linear", "activations": KEPT},
        {"op": "int4_linear", "activations": KEPT, "peer": True},
        _by_m(1.6, (2, 2), 2), peak={512: 0.5}, factors="bfloat16",
    ),
    Goal(
        "int8, activations int8 per row",
        {"op": "int8_dynamic_linear", "activations": PER_ROW},
        {"op": "int8_dynamic_linear", "activations": PER_ROW, "peer": True},
        _by_m(1.1, (1.4, 1.4), 1.5), read={1: 0.85}, peak={512: 0.55},
    ),
    Goal(
        "sparse24 bf16 against torch's dense bf16",
        {"op": "sparse24_linear", "dtype": "bfloat16"},
        {"op": "linear", "dtype": "bfloat16", "peer": "torch."},
        _by_m(1.6, (1.4, 1.4), 1.0),
    ),
    Goal(
        "sparse24_int4 against our int4",
        {"op": "sparse24_int4_linear"}, {"op": "int4_linear", "activations": KEPT},
        _by_m(1.2, (1.1, 1.1), 0.9), large_only=(1,), same_dtype=True,
    ),
    Goal(
        "bitmask 50 % int8 against our int8",
        {"op": "bitmask_linear", "values": "int8"}, {"op": "int8_linear"},
        _by_m(1.3, (1.1, 1.1), 0.8), large_only=(1,), same_dtype=True,
    ),
)  # fmt: skip


def asked(limits: dict[str, Any]) -> tuple[Goal, ...]:
    """The goals on the machine of these limits: without a level above AVX2, no more than to equal the best."""
    if set(limits["peaks"]) != {"baseline", "avx2"}:
        return GOALS
    return tuple(
        goal._replace(ratio={m: min(1.0, ratio) for m, ratio in goal.ratio.items()}, read={}, peak={}) for goal in GOALS
    )


def judge(rows: Sequence[Row], limits: dict[str, Any], wanted: Sequence[Goal] | None = None) -> list[dict[str, Any]]:
    """One entry per goal, shape, M (and dtype): what is asked for, what was measured, whether it is met.

    wanted: the goals; by default those of this machine's CPU. A ratio's `share_needed` is the share of the machine's
    limit at which our kernel would reach it: above 1 no kernel can. None where the limit is not known.
    """
    timed = [row for row in rows if row["median_us"]]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in timed))
    found: list[dict[str, Any]] = []
    for goal in asked(limits) if wanted is None else wanted:
        for n, k in (shape for shape in shapes if shape[0] * shape[1] >= goal.least):
            here = [row for row in timed if (row["n"], row["k"]) == (n, k)]
            for m in dict.fromkeys(row["m"] for row in here):
                found += _judge_at(goal, [row for row in here if row["m"] == m], n * k >= LARGE, limits)
    return found


def _judge_at(goal: Goal, rows: Sequence[Row], large: bool, limits: dict[str, Any]) -> Iterable[dict[str, Any]]:
    ours, theirs = _chosen(rows, {"peer": None, **goal.ours}), _chosen(rows, {"peer": None, **goal.theirs})
    dtypes = dict.fromkeys(row["dtype"] for row in ours) if goal.same_dtype else (None,)
    for dtype in dtypes:
        mine = min((r for r in ours if dtype in (None, r["dtype"])), key=_median, default=None)
        best = min((r for r in theirs if dtype in (None, r["dtype"])), key=_median, default=None)
        if mine is None:
            continue
        m = mine["m"]
        entry = {
            "goal": goal.name, "n": mine["n"], "k": mine["k"], "m": m, "dtype": mine["dtype"],
            "kernel": mine["kernel"], "median_us": mine["median_us"],
        }  # fmt: skip
        if best is not None and m in goal.ratio and (large or m not in goal.large_only):
            who = best["peer"] or f"{best['op']} {best['kernel']}"
            more = {"kind": "ratio", "against": who, "against_dtype": best["dtype"], "against_us": best["median_us"]}
            more["share_needed"] = _share_needed(mine, best["median_us"] / goal.ratio[m])
            yield _entry(entry, more, goal.ratio[m], best["median_us"] / mine["median_us"])
        if m in goal.read and large and limits["read_gb_s"]:
            share = mine["bytes"] / limits["read_gb_s"] / 1e3 / mine["median_us"]
            yield _entry(entry, {"kind": "share of read bandwidth"}, goal.read[m], share)
        if m in goal.peak and large and (peak := limits[f"{goal.factors}_gop_s"]):
            share = mine["operations"] / peak / 1e3 / mine["median_us"]
            yield _entry(entry, {"kind": f"share of {goal.factors} peak"}, goal.peak[m], share)


def _share_needed(mine: Row, wanted_us: float) -> float | None:
    share = mine.get("limit_share")  # rows of a GPU are not related to a limit
    return None if share is None else round(share * mine["median_us"] / wanted_us, 3)


def _entry(entry: dict[str, Any], more: dict[str, Any], wanted: float, got: float) -> dict[str, Any]:
    return {**entry, **more, "wanted": wanted, "measured": round(got, 3), "met": got >= wanted}


def _median(row: Row) -> float:
    return row["median_us"]


def _chosen(rows: Sequence[Row], wanted: dict[str, Any]) -> list[Row]:
    return [row for row in rows if all(_matches(row[key], value) for key, value in wanted.items())]


def _matches(got: Any, wanted: Any) -> bool:
    if wanted is True:
        return got is not None
    if isinstance(wanted, str) and wanted.endswith("."):
        return isinstance(got, str) and got.startswith(wanted)
    return got == wanted


def cells(judged: Sequence[dict[str, Any]], columns: Sequence[tuple[int, ...]] = COLUMNS) -> list[list[str]]:
    """Lines of the goals' table: the goal, what is compared, and per column of Ms the worst measured against wanted."""
    lines = []
    for goal, kind in dict.fromkeys((entry["goal"], entry["kind"]) for entry in judged):
        line = [goal, kind]
        for column in columns:
            here = [e for e in judged if (e["goal"], e["kind"]) == (goal, kind) and e["m"] in column]
            line.append(_cell(here))
        lines.append(line)
    return lines


def _cell(entries: Sequence[dict[str, Any]]) -> str:
    if not entries:
        return "-"
    worst = min(entries, key=lambda entry: entry["measured"] / entry["wanted"])
    met = sum(entry["met"] for entry in entries)
    verdict = "met" if met == len(entries) else f"not met ({met} of {len(entries)})"
    return f"{verdict}: worst {worst['measured']:.2f} of {worst['wanted']:g} ({worst['n']}x{worst['k']} M={worst['m']})"


def reach(judged: Sequence[dict[str, Any]]) -> str:
    """How many of the ratios that are not met the machine's limit leaves no room for; empty if all are met."""
    unmet = [entry for entry in judged if entry["kind"] == "ratio" and not entry["met"]]
    needed = [entry["share_needed"] for entry in unmet if entry["share_needed"] is not None]
    if not needed:
        return ""
    over = [sum(share > most for share in needed) for most in OUT_OF_REACH]
    counts = ", ".join(f"{count} more than {most:.0%}" for count, most in zip(over, OUT_OF_REACH, strict=True))
    return f"{len(unmet)} ratios are not met. To meet them takes, of the machine's limit: {counts}"
