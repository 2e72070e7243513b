"""JSON files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 100 << 20  # bytes; the index of the largest models has some MB


def read_object(path: Path, caller: str) -> dict[str, Any]:
    """The object in a JSON file.

    ValueError naming the file when it cannot be read, and unless it is UTF-8, small, well formed, not too deep, without
    a key twice, and an object.
    """
    try:
        if not path.is_file():  # a device would have no end
            raise ValueError("it is no file" if path.exists() else "it is not there")
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"larger than {LARGEST} bytes")
        data = json.loads(text.decode("utf-8"), object_pairs_hook=without_twins)
    except RecursionError:
        raise ValueError(f"{caller}: {path.name} cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{caller}: {path.name} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{caller}: {path.name} must hold an object, got {type(data).__name__}")
    return data


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict. ValueError for a key that is there twice: readers differ in which they take."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.100} is there twice")
        found[key] = value
    return found
