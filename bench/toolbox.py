"""Pruned, distilled and quantized: size, perplexity and speed of SmolLM2-135M after each step of the example.

`--made FOLDER` measures what the example has made there before, on a machine that does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.results import write
from examples import prune_distil_quantize as example


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.toolbox", description=__doc__.split("\n")[0])
    parser.add_argument("--made", type=Path, help="a folder of the example's, with the same options")
    parser.add_argument("rest", nargs="*", help="after --: options of the example")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        options = example.options().parse_args([*args.rest, "--out", str(args.made or folder)])
        if args.made is None:
            example.make(options)
        rows = list(example.measure(options))
    about = {key: value for key, value in vars(options).items() if key != "out"}
    write("toolbox", {"options": about, "rows": rows})


if __name__ == "__main__":
    main()
