"""`llmkern demo` as users run it, its result kept with machine and commit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.results import write


def main(argv: Sequence[str] | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmkern", "demo", "--json", "--out", str(Path(folder) / "demo")]
        done = subprocess.run([*command, *(argv or ())], stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    for row in result["rows"]:
        del row["folder"]  # gone by now, and no business of the reader
    del result["report"]
    write("demo", result)


if __name__ == "__main__":
    main(sys.argv[1:])
