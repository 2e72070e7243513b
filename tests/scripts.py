"""Scripts of this folder in a process of their own: those that fork, are killed, or start ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

ENV = {
    **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def said_by(script, *arguments):
    """The JSON object on the last line that the script prints; AssertionError with its errors if it fails."""
    command = [sys.executable, Path(__file__).with_name(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
