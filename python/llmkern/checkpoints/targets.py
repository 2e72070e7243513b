"""Which module a quantization_config means: names, class names, and `re:` patterns, as compressed-tensors matches them.

Patterns come from a file that nobody has vouched for, and Python's `re` may take exponential time, so those that could
are refused: a repeated group that repeats inside, back references, and more open repeats than real patterns have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

MAX_PATTERN, MAX_REPEATS, MAX_NAME = 400, 5, 300
# A quantifier without an upper bound, or with a large one; `(?` is no quantifier.
_OPEN = re.compile(r"(?<!\\)(?:\*|\+|\{\d*,?\d*\})")
_GROUP = re.compile(r"(?<!\\)\)(?:\*|\+|\{)")


def check_pattern(pattern: Any, where: str) -> re.Pattern[str]:
    """The compiled pattern; ValueError where it is no pattern, or one that may run for ever."""
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        raise ValueError(f"{where}: a pattern must be text of at most {MAX_PATTERN} characters, got {pattern!r:.80}")
    plain = re.sub(r"\[[^\]]*\]", "x", pattern)
    if _GROUP.search(plain) or len(_OPEN.findall(plain)) > MAX_REPEATS or re.search(r"\\[1-9]|\(\?P=|\(\?\(", plain):
        raise ValueError(f"{where}: the pattern {pattern!r:.80} may take exponential time; it is not run")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {pattern!r:.80} is no pattern: {error}") from None


class Targets:
    """A list of targets: exact names first, then patterns, then class names."""

    def __init__(self, targets: Iterable[Any], where: str) -> None:
        """ValueError for a target that is no text, or a pattern that cannot be run."""
        self.names: set[str] = set()
        self.patterns: list[re.Pattern[str]] = []
        for target in targets:
            if not isinstance(target, str):
                raise ValueError(f"{where}: a target must be text, got {target!r:.80}")
            if target.startswith("re:"):
                self.patterns.append(check_pattern(target[3:], where))
            else:
                self.names.add(target)

    def rank(self, names: tuple[str, ...], kind: str) -> int | None:
        """How exactly a module is meant: 0 by its name, 1 by a pattern, 2 by its class; None: it is not."""
        names = tuple(name for name in names if len(name) <= MAX_NAME)
        if any(name in self.names for name in names):
            return 0
        if any(pattern.match(name) for pattern in self.patterns for name in names):
            return 1
        return 2 if kind in self.names else None
