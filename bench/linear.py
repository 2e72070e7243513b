"""`llmkern bench` with its result kept in bench/results: the linear ops against the machine's limits and their peers.

Arguments are the command's; without any, the shapes of the goals with every installed peer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.results import RESULTS, write
from llmkern_cli import bench
from llmkern_cli._bench import plot


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.split("\n")[0])
    bench.arguments(parser)
    parser.add_argument("--name", default="linear", help="bench/results/NAME.json and NAME.svg (%(default)s)")
    args = parser.parse_args(argv or ["--peers"])
    result = bench.run(args)
    print(bench.show(result))
    del result["machine"]  # `write` says more
    write(args.name, result)
    (RESULTS / f"{args.name}.svg").write_text(plot.render(result["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
