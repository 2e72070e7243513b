"""What the commands share: argument types, progress lines, tables, and output folders."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkern.recipe import Recipe
    from llmkern.report import Report


class UsageError(Exception):
    """The command line itself is wrong: exit code 2."""


def at_least(least: int) -> Any:
    """An argparse type: an int of at least `least`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"wanted at least {least}, got {value}")
        return value

    return convert


def number(*, above: float | None = None, least: float | None = None) -> Any:
    """An argparse type: a finite float greater than `above`, or of at least `least`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted a number, got {text!r}") from None
        if above is not None and not above < value < float("inf"):
            raise argparse.ArgumentTypeError(f"wanted more than {above}, got {text}")
        if least is not None and not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"wanted at least {least}, got {text}")
        return value

    return convert


def calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which windows of which text calibrate."""
    parser.add_argument(
        "--calibration", default="builtin", metavar="builtin|FILE|hf:NAME", help="its first three quarters are used"
    )
    parser.add_argument("--samples", type=at_least(1), default=128, metavar="N", help="windows (%(default)s)")
    parser.add_argument("--seqlen", type=at_least(2), default=512, metavar="L", help="tokens per window (%(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="of the windows' starts (%(default)s)")


def progress(text: str) -> None:
    """One line to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns separated by two spaces: numbers to the right, text to the left."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


class Number(float):
    """A float that a table shows with a fixed number of digits."""

    digits: int

    def __new__(cls, value: float, digits: int) -> Number:
        """`digits` after the point."""
        self = super().__new__(cls, value)
        self.digits = digits
        return self

    def __str__(self) -> str:
        return f"{float(self):,.{self.digits}f}"


def megabytes(size: int) -> Number:
    """Bytes as decimal megabytes with one digit."""
    return Number(size / 1e6, 1)


def quiet_transformers() -> None:
    """No advice and, when nobody watches, no bars from transformers in the middle of our own lines."""
    from llmkern.models import need_transformers

    need_transformers()
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def parse_recipe(text: str) -> Recipe:
    """A short form, or a recipe file; UsageError when it is neither."""
    import llmkern

    try:
        if Path(text).suffix in (".yaml", ".yml", ".json"):
            return llmkern.Recipe.load(text)
        return llmkern.Recipe.parse(text)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What --recipe says, and the fields that a command has options for; UsageError if they do not fit."""
    fields = ("experts", "objective", "input_correction")
    asked = {key: value for key in fields if (value := getattr(args, key, None)) is not None}
    try:
        return replace(parse_recipe(args.recipe), **asked)
    except ValueError as error:
        raise UsageError(str(error)) from error


def refuse_foreign(out: Path, marker: str = "llmkern.json") -> None:
    """Raise unless `out` can be made, is an empty folder, or is a folder that holds our `marker` file.

    FileExistsError for what is there already, NotADirectoryError or PermissionError where no folder can be made.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"--out {out}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"--out {out}: {parent} cannot be written to")
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"--out {out}: exists and is not a folder")
    if any(out.iterdir()) and not (out / marker).is_file():
        raise FileExistsError(f"--out {out}: exists and is not from llmkern (no {marker} in it); nothing was written")


def state_folder(out: Path) -> Path:
    """Where a run keeps what it has finished until `out` is whole: a hidden folder beside it."""
    out = out.absolute()
    return out.with_name(f".{out.name}.llmkern-state")


def resume(out: Path, asked: bool, steps: Sequence[str] = ()) -> Path:
    """The state folder of a run that writes `out`. FileExistsError where there is one that nobody asked to resume.

    steps: the folders in it that hold a state each, of a run that has several; what a run of one state left there is
    refused.
    """
    from llmkern.state import parts_in

    state = state_folder(out)
    parts = parts_in(state)
    if steps and parts:
        raise FileExistsError(f"--out {out}: {state} is of another kind of run: delete that folder to start again")
    parts += sum(parts_in(state / step) for step in steps)
    if parts and not asked:
        raise FileExistsError(
            f"--out {out}: a run that did not end, or still runs, has {parts} finished parts in {state}: "
            "add --resume to go on with it, or delete that folder to start again"
        )
    if asked:
        progress(f"resuming after {parts} finished parts" if parts else "nothing to resume: starting from scratch")
    return state


def compress_into(out: Path, model: Any, tokenizer: Any, recipe: Recipe, windows: Any) -> Report:
    """Compress `model` in place and write it, its tokenizer and the report to `out`, all or nothing.

    windows: calibration token ids [n, L]; None will do for a recipe that needs no data.
    """
    import llmkern

    report = llmkern.compress(model, recipe, windows, progress=True)
    llmkern.save(model, out, tokenizer=tokenizer, report=report)
    return report
