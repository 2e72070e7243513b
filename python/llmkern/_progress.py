"""A progress bar on stderr: redrawn on a terminal, a line per tenth elsewhere."""

from __future__ import annotations

import sys
import time

WIDTH = 30


class Progress:
    """`total` steps under one title; silent unless `show`."""

    def __init__(self, title: str, total: int, show: bool) -> None:
        self.title, self.total, self.show = title, max(total, 1), show
        self.done, self.start, self._tenth = 0, time.perf_counter(), 0

    def step(self, what: str, count: int = 1) -> None:
        """`count` more steps are done; the last of them was `what`."""
        self.done += count
        if not self.show:
            return
        share = min(self.done / self.total, 1.0)
        text = f"{self.title} {self.done}/{self.total} {time.perf_counter() - self.start:.0f} s {what}"
        if sys.stderr.isatty():
            bar = "#" * round(WIDTH * share)
            end = "\n" if self.done >= self.total else ""
            print(f"\r\x1b[K[{bar:<{WIDTH}}] {text}", end=end, file=sys.stderr, flush=True)
        elif int(10 * share) > self._tenth:
            self._tenth = int(10 * share)
            print(text, file=sys.stderr, flush=True)
