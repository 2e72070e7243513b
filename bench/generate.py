"""`llmkern bench --model`: prefill and decode of SmolLM2 and of a random 1B Llama, dense against each recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.results import write
from llmkern_cli import bench
from llmkern_cli._bench import generate


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__.split("\n")[0])
    bench.arguments(parser)
    parser.add_argument("--models", default=f"smollm2,{generate.RANDOM}", help="by commas (%(default)s)")
    args = parser.parse_args(argv)
    models = []
    for name in args.models.split(","):
        args.model = name
        result = bench.run(args)
        print(bench.show(result))
        del result["machine"]
        models.append(result)
    write("generate", {"models": models})


if __name__ == "__main__":
    main(sys.argv[1:])
