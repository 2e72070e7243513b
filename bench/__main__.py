"""All benchmarks with their defaults, one after the other; `python -m bench linear` runs only that one."""

import importlib
import sys

BENCHMARKS = (
    "import_cost", "overhead", "threads", "after", "linear", "generate", "solvers", "solver_peers", "solver_scaling",
    "quality", "ablation", "memory", "load", "distill_loss", "structured",
    "recovery", "student", "toolbox", "demo",
)  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    for name in names:
        if name not in BENCHMARKS:
            sys.exit(f"bench: unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"bench.{name}", file=sys.stderr, flush=True)
        importlib.import_module(f"bench.{name}").main([])


if __name__ == "__main__":
    main()
