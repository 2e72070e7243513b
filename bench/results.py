"""What every result file says about where and when it was taken."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import llmkern
from llmkern import _features
from llmkern_cli.env import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def about() -> dict[str, Any]:
    """Machine, commit and versions."""
    return {
        **machine(),
        "levels": [level.name for level in _features.levels() if level.available],
        "threads": torch.get_num_threads(),
        "llmkern": llmkern.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """bench/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": about(), **result}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
    return path


def _commit() -> str | None:
    """The commit of the code that ran, with -dirty when the code (not results or documents) differs from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "python", "csrc", "bench/*.py", "CMakeLists.txt", "pyproject.toml")
    return f"{commit}-dirty" if changed else commit


def _git(*args: str) -> str | None:
    """What git prints, or None: there may be no git, or no repository."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
