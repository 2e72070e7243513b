"""The command line `llmkern`.

A package of its own, beside `llmkern`: importing any module of `llmkern` runs its `__init__`, which imports torch, and
`llmkern --help` must answer before that. Each command is a module with `NAME`, `HELP`, `arguments(parser)`,
`run(args) -> dict` (the object of `--json`) and `show(result) -> str`; torch is imported inside `run`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from llmkern_cli import bench, compress, convert, demo, distill, env, evaluate, inspect, plan, prune, verify
from llmkern_cli._common import UsageError

COMMANDS: tuple[ModuleType, ...] = (
    env, plan, compress, prune, distill, evaluate, bench, inspect, verify, convert, demo,
)  # fmt: skip

# Their own text says what is wrong; of any other exception the kind is needed as well to understand the line.
_PLAIN_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


def version() -> str:
    """The version of llmkern, read without importing it."""
    spec = importlib.util.find_spec("llmkern")
    if spec is None or spec.origin is None:
        raise ImportError("the package llmkern is not installed")
    text = Path(spec.origin).with_name("_version.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "(.+)"', text)
    if match is None:
        raise ImportError("llmkern/_version.py holds no version")
    return match[1]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="llmkern", description="Prune, quantize and distil language models, and run the result on native kernels."
    )
    top.add_argument("--version", action="version", version=f"llmkern {version()}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress goes to stderr")
    shared.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        sub = commands.add_parser(module.NAME, parents=[shared], help=module.HELP, description=module.HELP)
        module.arguments(sub)
        sub.set_defaults(module=module)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 success, 1 failure, 2 bad usage."""
    args = parser().parse_args(argv)
    if not sys.stderr.isatty():
        # Libraries' bars; tqdm reads this when torch first imports it.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        # Whatever a library prints must not get between the caller and the one object on stdout.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = functools.partial(_warn, args)
            result = args.module.run(args)
        if result is None:  # another process has it
            return 0
        print(json.dumps(result, indent=2) if args.json else args.module.show(result), flush=True)
        return 1 if result.get("error") else 0
    except KeyboardInterrupt as stop:
        return _fail(args, f"interrupted: {stop}" if str(stop) else "interrupted", 1)
    except BrokenPipeError:
        # The reader (`| head`) has left; python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(args, _one_line(error), 2)
    except _PLAIN_ERRORS as error:
        return _fail(args, _one_line(error), 1)
    except Exception as error:
        return _fail(args, f"{type(error).__name__}: {_one_line(error)}", 1)


def _fail(args: argparse.Namespace, text: str, code: int) -> int:
    if args.traceback:
        traceback.print_exc()
    print(f"llmkern {args.command}: error: {text}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": text}, indent=2), flush=True)
    return code


def _warn(args: argparse.Namespace, message: Warning | str, *where: object, **more: object) -> None:
    print(f"llmkern {args.command}: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(line for line in lines if line) or type(error).__name__
