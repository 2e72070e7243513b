"""What `import llmkern` costs after `import torch`, in fresh processes: wall-clock time, and time on the processor.

The import runs in one thread, so on an idle machine the two agree; on a shared one the second is the import's own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence

from bench.results import write

CODE = """
import time
import torch
wall, cpu = time.perf_counter(), time.process_time()
import llmkern
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.import_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args(argv)
    times = []
    for _ in range(args.runs + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        times.append([1000 * float(seconds) for seconds in done.stdout.split()])
    wall, cpu = zip(*times[1:], strict=True)  # the first also reads the files from disk
    result = {
        "median_ms": round(statistics.median(wall), 1),
        "median_cpu_ms": round(statistics.median(cpu), 1),
        "runs": len(wall),
    }
    print(f"import llmkern after import torch: {result['median_ms']} ms, {result['median_cpu_ms']} on the processor")
    write("import_cost", result)


if __name__ == "__main__":
    main()
