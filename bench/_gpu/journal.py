"""What a step has done so far, a line of JSON each: it survives a process that dies, and the next one goes on there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """Lines appended to a file, each written through at once."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines that are whole: a process may have died while it wrote the last one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("}\n")]
