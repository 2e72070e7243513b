"""Problem: a note that says that something went wrong, beside the notes that say how it is."""

from __future__ import annotations


class Problem(str):
    """One of a Solution's notes that `llmkern.compress(strict=True)` makes an error.

    Notes that are plain str are facts: how codes are stored, what the loss is measured by. A Problem says that the
    numbers, the data or the grid were not good enough for what was asked.
    """
