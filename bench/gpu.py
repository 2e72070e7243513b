"""Everything that a GPU machine is asked, in one command and under nine minutes: `make gpu OUT=folder`.

Builds the native modules in place, runs the GPU tests and compute-sanitizer, measures the machine's ceilings, the
solvers, and the linear ops with their peers, and writes gpu.json, gpu.md and the logs into the folder. Every step has
a budget and may fail without stopping the next; its status is in the JSON. Time that a step leaves goes to the
benchmark, whose rows that are not reached say so. Needs no network: the Python that runs this has to hold torch,
triton, pytest, pybind11, cmake and ninja.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench._gpu import supervise
from bench._gpu.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.7
STEPS = ("build", "tests", "sanitize", "ceilings", "solver", "bench")
# Seconds at most; the benchmark has what is left.
BUDGET = {"build": 210.0, "tests": 210.0, "sanitize": 150.0, "ceilings": 30.0, "solver": 45.0}
RESERVE = 6.0  # at the end, for the tables
QUIET = {"tests": 90.0, "bench": 75.0, "solver": 40.0}  # seconds without a sign of life: it hangs
WORKERS = 14  # processes of the tests, where pytest-xdist is there: most of their time is Triton's compiler
OUT_OF_TIME = "out of time"  # of a step, and of a row that was not reached (bench._gpu.sweep)
TESTS_DONE = (0, 1, 5)  # pytest's codes for passed, some failed, none left


class Session:
    """One run: where its files are, what time is left, and what each step had to say."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.out: Path = args.out.resolve()
        self.work, self.dry, self.args = work, args.dry_run, args
        self.device = "cpu" if args.dry_run else "cuda"
        self.end = time.monotonic() + 60 * args.minutes
        # The modules are built into the source tree; a dry run builds nothing and takes what is installed.
        paths = [str(ROOT)] if args.dry_run else [str(ROOT / "python"), str(ROOT)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self.env = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self._lock = threading.Lock()  # two steps run side by side
        self.steps: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {
            "machine": {}, "steps": self.steps, "tests": None, "sanitizer": [], "ceilings": None, "rows": [],
            "goals": [], "solver": [],
        }  # fmt: skip

    def left(self) -> float:
        return self.end - RESERVE - time.monotonic()

    def quiet(self, name: str) -> float | None:
        """After how many seconds without a sign of life a step hangs; a dry run may be on a machine with other work."""
        return None if self.dry else QUIET[name]

    def journal(self, name: str) -> Journal:
        return Journal(self.work / f"{name}.jsonl")

    def python(self, *args: str) -> list[str]:
        return [sys.executable, *args]

    def step(self, name: str, work: Callable[[float], tuple[str, str]]) -> None:
        """Run a step that returns (status, note); what it raises is its status."""
        start = time.monotonic()
        seconds = self.left() if self.dry else min(BUDGET.get(name, self.left()), self.left())
        if name not in self.args.steps:
            status, note = "not asked", ""
        elif seconds <= 0:
            status, note = OUT_OF_TIME, ""
        else:
            print(f"gpu: {name} (at most {seconds:.0f} s)", file=sys.stderr, flush=True)
            try:
                status, note = work(seconds)
            except Exception as error:
                status, note = "failed", f"{type(error).__name__}: {error}"[:300]
        took = time.monotonic() - start
        with self._lock:
            self.steps.append({"step": name, "status": status, "seconds": round(took, 1), "note": note})
            print(f"gpu: {name}: {status} {note} ({took:.0f} s)", file=sys.stderr, flush=True)
            self.save()

    def save(self) -> None:
        """What there is so far, so that a run that is stopped leaves it."""
        rows = [row for row in self.found["rows"] if row["skipped"] != OUT_OF_TIME]
        found = {**self.found, "rows": rows, "rows_not_reached": len(self.found["rows"]) - len(rows)}
        (self.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    # The steps.

    def build(self, seconds: float) -> tuple[str, str]:
        """The native modules in place; without CUDA where that fails, so that the next steps have what there is."""
        if self.dry:
            return "skipped", "dry run"
        end = time.monotonic() + seconds
        log, folder, reason = self.out / "build.log", ROOT / "build" / "native-gpu", ""
        for cuda in ("ON", "OFF"):
            try:
                steps = (self._configure(folder, cuda), [*_tool("cmake"), "--build", str(folder)])
                for command in steps:
                    before = log.stat().st_size if log.exists() else 0
                    done = supervise.run(command, log, end - time.monotonic(), env=_tools_on_path())
                    if done.out_of_time or done.code:
                        raise RuntimeError("out of time" if done.out_of_time else f"{_errors(log, before)} (build.log)")
            except (RuntimeError, OSError) as error:
                reason += f"{'with' if cuda == 'ON' else 'without'} CUDA: {error}"[:400] + " "
                continue
            return ("ok", "with CUDA") if cuda == "ON" else ("failed", f"built without CUDA; {reason}")
        return "failed", reason

    def _configure(self, folder: Path, cuda: str) -> list[str]:
        done = subprocess.run(self.python("-m", "pybind11", "--cmakedir"), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pybind11 is missing: {done.stderr.strip().splitlines()[-1:]}")
        return [
            *_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DLLMKERN_DEV_INPLACE=ON",
            "-DLLMKERN_WERROR=OFF", f"-DLLMKERN_CUDA={cuda}",
            f"-Dpybind11_DIR={done.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip

    def tests(self, seconds: float) -> tuple[str, str]:
        """pytest tests/gpu, begun again behind a test that took the process or the context with it."""
        journal = self.journal("tests")
        command = self.python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench._gpu.record", "--record", str(journal.path),
            "--device", self.device, "--tb", "short", "-ra", str(ROOT / "tests" / "gpu"),
        )  # fmt: skip
        if self.dry:
            command += ["-k", "bad_input"]
        elif importlib.util.find_spec("xdist") and (os.cpu_count() or 1) > WORKERS:
            command += ["-n", str(WORKERS)]
        outcome = supervise.run(
            command, self.out / "tests.log", seconds, env=self.env, journal=journal, quiet=self.quiet("tests"),
            finished=TESTS_DONE,
        )  # fmt: skip
        from bench._gpu import record

        found = self.found["tests"] = record.summary(journal.read())
        counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "died", "skipped"))
        if outcome.out_of_time:
            return OUT_OF_TIME, counts
        good = outcome.code == 0 and not found["died"] and found["passed"]
        return ("ok" if good else "failed"), "; ".join([counts, *outcome.deaths])

    def sanitize(self, seconds: float) -> tuple[str, str]:
        """compute-sanitizer's tools over every op and kernel."""
        from bench._gpu import sanitize

        rows = self.found["sanitizer"] = sanitize.run(self.work, seconds, self.env, self.device)
        with (self.out / "sanitize.log").open("w", encoding="utf-8") as out:
            for log in (self.work / f"{row['tool']}.log" for row in rows):
                if log.exists():
                    out.write(f"==== {log.stem}\n{log.read_text(encoding='utf-8', errors='replace')}\n")
        notes = [f"{row['tool']}: {row['skipped'] or row['found']}" for row in rows if row["tool"] != "none"]
        if any(row["found"] or row["wrong"] or row["skipped"] for row in rows):
            return "failed", "; ".join(notes)
        return (OUT_OF_TIME if any(row["out_of_time"] for row in rows) else "ok"), "; ".join(notes)

    def ceilings(self, seconds: float) -> tuple[str, str]:
        """The machine at its best."""
        path = self.work / "ceilings.json"
        command = self.python("-m", "bench._gpu.ceilings", self.device, str(path))
        outcome = supervise.run(command, self.out / "measure.log", seconds, env=self.env)
        if path.exists():
            self.found["ceilings"] = json.loads(path.read_text(encoding="utf-8"))
        return _status(outcome, self.found["ceilings"] is not None)

    def solver(self, seconds: float) -> tuple[str, str]:
        """The block kernels and whole layers."""
        journal = self.journal("solver")
        command = self.python("-m", "bench._gpu.solver", self.device, str(journal.path))
        outcome = supervise.run(
            command, self.out / "measure.log", seconds, env=self.env, journal=journal, quiet=self.quiet("solver")
        )
        self.found["solver"] = [entry["row"] for entry in journal.read() if "row" in entry]
        return _status(outcome, bool(self.found["solver"]))

    def bench(self, seconds: float) -> tuple[str, str]:
        """The linear ops and their peers."""
        journal = self.journal("sweep")
        command = self.python(
            "-m", "bench._gpu.sweep", str(journal.path), "--device", self.device, "--dtype", self.args.dtype,
            "--plan", "tiny" if self.dry else "full", "--ceilings", str(self.work / "ceilings.json"),
            "--until", str(time.time() + seconds - 8), "--seconds", "0" if self.dry else str(self.args.seconds),
        )  # fmt: skip
        outcome = supervise.run(
            command, self.out / "measure.log", seconds, env=self.env, journal=journal, quiet=self.quiet("bench")
        )
        self.found["rows"] = self._rows(journal.path)
        late = sum(row["skipped"] == OUT_OF_TIME for row in self.found["rows"])
        status, note = _status(outcome, any(row["median_us"] for row in self.found["rows"]))
        if late and status != "failed":
            status = OUT_OF_TIME
        return status, f"{late} rows out of time; {note}".strip("; ")

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        from bench._gpu.ceilings import as_limits
        from bench._gpu.goals import judged
        from bench._gpu.sweep import rows_of

        rows = rows_of(Journal(path).read())
        self.found["goals"] = judged(rows, as_limits(self.found["ceilings"]))
        return rows

    def describe(self) -> None:
        """The machine, in a process of its own that sees the modules just built."""
        code = (
            "import json, sys; from bench._gpu.machine import describe; "
            "print(json.dumps(describe(sys.argv[1], sys.argv[2] or None)))"
        )
        try:
            done = subprocess.run(
                self.python("-c", code, self.device, self.args.commit), capture_output=True, text=True, check=False,
                cwd=ROOT, env={**os.environ, **self.env}, timeout=max(1.0, min(60.0, self.left())),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            self.found["machine"] = {"error": OUT_OF_TIME}
            return
        try:
            self.found["machine"] = json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            self.found["machine"] = {"error": done.stderr.strip()[-500:]}


def _tool(name: str) -> list[str]:
    """A build tool: on the path, beside this Python, or as a module of it."""
    beside = Path(sys.executable).parent / name
    if found := shutil.which(name) or (str(beside) if beside.exists() else None):
        return [found]
    if importlib.util.find_spec(name) is None:
        raise RuntimeError(f"{name} is missing")
    return [sys.executable, "-m", name]


def _tools_on_path() -> dict[str, str]:
    """cmake looks for ninja and nvcc on the path."""
    more = (str(Path(sys.executable).parent), "/usr/local/cuda/bin")
    return {"PATH": os.pathsep.join((*more, os.environ.get("PATH", "")))}


def _errors(log: Path, start: int) -> str:
    """The first line of a build's log behind byte `start` that says what is wrong."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if "error" in line.lower() or "FAILED" in line), len(lines) - 1)
    return " ".join(lines[at : at + 3])


def _status(outcome: supervise.Outcome, some: bool) -> tuple[str, str]:
    notes = "; ".join(outcome.deaths)
    if outcome.out_of_time:
        return OUT_OF_TIME, notes
    if outcome.code or not some:
        return "failed", notes or f"exit code {outcome.code}"
    return "ok", notes


def lacking() -> str | None:
    """Why there is nothing to run on, in one line."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported by {sys.executable}: {error}"
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    return f"no CUDA device: torch {torch.__version__} " + (f"(CUDA {built}) finds none" if built else "has no CUDA")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results (%(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (%(default)s)")
    parser.add_argument("--steps", default=",".join(STEPS), help="by commas (%(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="of x in the benchmark (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.012, help="per candidate and M (%(default)s)")
    parser.add_argument("--commit", default="", help="what the result says, where the tree is no repository")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: the flow without a GPU")
    args = parser.parse_args(argv)
    args.steps = args.steps.split(",")
    if unknown := [name for name in args.steps if name not in STEPS]:
        parser.error(f"--steps: unknown {', '.join(unknown)}; known: {', '.join(STEPS)}")
    if not args.dry_run and (reason := lacking()):
        print(f"gpu: {reason}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for old in ("build", "tests", "sanitize", "measure"):
        (args.out / f"{old}.log").unlink(missing_ok=True)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as work:
        return _run(Session(args, Path(work)))


def _run(session: Session) -> int:
    """All steps; 0 when each that was asked for is fine."""
    session.step("build", session.build)
    session.describe()
    # Neither is timed, and both wait for compilers most of the time.
    with ThreadPoolExecutor(2) as pool:
        pair = [pool.submit(session.step, name, getattr(session, name)) for name in ("tests", "sanitize")]
        for one in pair:
            one.result()
    for name in ("ceilings", "solver", "bench"):
        session.step(name, getattr(session, name))
    from bench._gpu import report

    session.save()
    (session.out / "gpu.md").write_text(report.render(session.found), encoding="utf-8")
    print(report.render({**session.found, "rows": []}))
    print(f"gpu: wrote {session.out / 'gpu.json'} and gpu.md", file=sys.stderr)
    return 1 if any(step["status"] in ("failed", OUT_OF_TIME) for step in session.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
