"""`make gpu` without a GPU: its flow on tiny CPU sizes, and each part that judges, restarts or reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench._gpu import goals, plan, record, report, sanitize, supervise, sweep
from bench._gpu.ceilings import as_limits
from bench._gpu.journal import Journal
from bench._gpu.plan import Cell
from llmkern import _features
from llmkern_cli._bench import measure, peers
from llmkern_cli._bench.candidate import GIVEN, KEPT, PER_ROW
from llmkern_cli._bench.peers import torch_cuda
from llmkern_cli._bench.weights import Weights

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run."""
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_every_step_of_a_dry_run_has_its_status(dry):
    found = json.loads((dry / "gpu.json").read_text())
    steps = {step["step"]: step["status"] for step in found["steps"]}
    assert steps == {"build": "skipped", **dict.fromkeys(gpu.STEPS[1:], "ok")}
    assert found["machine"]["torch"] == torch.__version__
    assert {"commit", "kernels", "versions", "clocks", "gpu", "nvcc"} <= set(found["machine"])
    assert found["tests"]["passed"] > 0
    assert found["tests"]["failures"] == []
    assert found["sanitizer"][0]["cases"] > 0 or _features.native is None
    assert found["ceilings"]["copy_gb_s"] > 0
    assert len(list(dry.iterdir())) <= 8


def test_the_rows_of_a_dry_run_are_complete(dry):
    found = json.loads((dry / "gpu.json").read_text())
    rows = found["rows"]
    assert {Cell(row["n"], row["k"], row["m"], "all" if row["forced"] else "best") for row in rows} == set(plan.TINY)
    ours = [row for row in rows if row["kernel"] and not row["forced"]]
    assert {row["op"] for row in ours} == set(sweep.ours.OP_NAMES)
    for row in ours:
        assert row["median_us"] > 0, row["skipped"]
        assert row["timed"] == "eager"
        assert row["calls"] >= row["copies"] >= 2
        assert (row.get("eager_us") is not None) == (row["m"] in plan.EAGER_MS)
    assert {row["what"].split()[0] for row in found["solver"]} == {"block", "layer"}
    assert all(row["median_us"] or row["skipped"] for row in found["solver"])


def test_the_page_of_a_dry_run_has_every_table(dry):
    text = (dry / "gpu.md").read_text()
    for head in ("## Steps", "## Tests", "## compute-sanitizer", "## Ceilings", "## Solvers", "### 64 x 128"):
        assert head in text
    found = json.loads((dry / "gpu.json").read_text())
    assert report.render(found) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_one_clear_line(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gpu: no CUDA device: torch ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failing_step_does_not_stop_the_next(tmp_path):
    args = gpu.argparse.Namespace(out=tmp_path, dry_run=True, minutes=1, steps=["build", "bench"])
    session = gpu.Session(args, tmp_path)

    def broken(seconds):
        raise OSError("no such thing")

    session.step("build", broken)
    session.step("tests", broken)
    session.step("bench", lambda seconds: ("ok", ""))
    session.end = 0.0
    session.step("bench", broken)
    found = [(step["step"], step["status"]) for step in json.loads((tmp_path / "gpu.json").read_text())["steps"]]
    assert found == [("build", "failed"), ("tests", "not asked"), ("bench", "ok"), ("bench", "out of time")]


def python(code):
    return [sys.executable, "-c", code]


def test_a_process_that_dies_is_begun_again_behind_what_it_did(tmp_path):
    journal = Journal(tmp_path / "journal")
    code = (
        "import os, sys; from pathlib import Path; from bench._gpu.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1])); done = journal.read()\n"
        "if any('died' in entry for entry in done): sys.exit(0)\n"
        "journal.write(doing='it'); os.abort()"
    )
    command = [*python(code), str(journal.path)]
    outcome = supervise.run(command, tmp_path / "log", 60, env=ENVIRONMENT, journal=journal)
    assert (outcome.code, outcome.deaths) == (0, ["the process died of SIGABRT"])
    assert journal.read() == [{"doing": "it"}, {"died": "the process died of SIGABRT"}]


def test_a_process_that_hangs_or_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "RESTARTS", 1)
    journal = Journal(tmp_path / "journal")
    hangs = python("import time; time.sleep(60)")
    outcome = supervise.run(hangs, tmp_path / "log", 60, journal=journal, quiet=0.3)
    assert outcome.deaths == ["nothing happened for 0 s"] * 2
    outcome = supervise.run(hangs, tmp_path / "log", 0.3)
    assert outcome.out_of_time
    assert outcome.seconds < 10
    assert supervise.run(python("raise SystemExit(3)"), tmp_path / "log", 60).code == 3


def test_half_a_line_of_a_journal_is_left_out(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.write(one=1)
    with journal.path.open("a") as file:
        file.write('{"two": 2')
    assert journal.read() == [{"one": 1}]


def test_the_sweep_goes_on_behind_what_ended_it(tmp_path):
    journal = Journal(tmp_path / "journal")
    first, second = plan.TINY[:2]
    with torch.inference_mode():
        made = sweep.Sweep("cpu", torch.bfloat16, as_limits(None), 0.0)
        name = next(sweep.who(one) for one in made.candidates(first) if one.row["op"] == "int8_linear")
    journal.write(plan=plan.TINY[:3], templates=made.templates())
    journal.write(doing=first, who=name)
    journal.write(died="the process died of SIGSEGV")
    journal.write(doing=second, who=sweep.TIMING)
    journal.write(died="nothing happened for 75 s")
    sweep.main([str(journal.path), "--device", "cpu", "--plan", "tiny", "--seconds", "0"])
    rows = sweep.rows_of(journal.read())
    at_first = [row for row in rows if row["m"] == first.m and row["n"] == first.n]
    reasons = {row["op"]: row["skipped"] for row in at_first if row["kernel"]}
    assert reasons.pop("int8_linear") == "the process died of SIGSEGV"
    assert set(reasons.values()) == {None}
    at_second = [row for row in rows if row["m"] == second.m and row["n"] == second.n]
    assert {row["skipped"] for row in at_second} == {"nothing happened for 75 s"}
    assert {row["op"] for row in at_second} == {row["op"] for row in at_first}


def test_cells_that_are_not_reached_are_rows_with_that_reason(tmp_path):
    journal = Journal(tmp_path / "journal")
    sweep.main([str(journal.path), "--device", "cpu", "--plan", "tiny", "--until", "0"])
    rows = sweep.rows_of(journal.read())
    assert {row["skipped"] for row in rows} == {"out of time"}
    assert {Cell(row["n"], row["k"], row["m"], "all" if row["forced"] else "best") for row in rows} == set(plan.TINY)
    assert {row["op"] for row in rows} == {"linear", *sweep.ours.OP_NAMES}
    assert "Not measured" in report.render({**gpu.Session(_args(tmp_path), tmp_path).found, "rows": rows})


def _args(out):
    return gpu.argparse.Namespace(out=out, dry_run=True, minutes=1, steps=[])


def test_the_plan_has_every_cell_of_the_goals_first():
    wanted = {Cell(n, k, m, "best") for n, k in plan.GOAL_SHAPES for m in plan.GOAL_MS}
    assert set(plan.FULL[: len(wanted)]) == wanted
    assert len(set(plan.FULL)) == len(plan.FULL)
    shapes = {(cell.n, cell.k) for cell in plan.FULL}
    assert {(4096, 14336), (1024, 8192), (28672, 8192), (768, 2048), (2048, 768)} <= shapes
    assert {cell.m for cell in plan.FULL if (cell.n, cell.k) == (768, 2048)} == set(plan.MS)
    assert all(n * k >= goals.LEAST for n, k in plan.GOAL_SHAPES)


def row(op, median_us, *, m=1, peer=None, activations=KEPT, shape=(4096, 14336), forced=False, kernel="cuda.x"):
    return {
        "op": op, "peer": peer, "kernel": None if peer else kernel, "n": shape[0], "k": shape[1], "m": m,
        "dtype": "bfloat16", "activations": activations, "values": "int4", "median_us": median_us, "bytes": 1,
        "operations": 1, "forced": forced, "skipped": None,
    }  # fmt: skip


def test_goals_are_judged_by_what_runs_unforced():
    rows = [
        row("linear", 40.0, peer="torch.dense"), row("int4_linear", 10.0), row("int4_linear", 1.0, forced=True),
        row("int4_linear", 9.0, peer="other"), row("int4_linear", 1.0, peer="class", activations=PER_ROW),
        row("linear", 4.0, peer="torch.dense", shape=(64, 64)), row("int4_linear", 4.0, shape=(64, 64)),
    ]  # fmt: skip
    found = {entry["goal"]: entry for entry in goals.judged(rows, as_limits(None))}
    dense = found["int4 g128 against torch's dense"]
    assert (dense["measured"], dense["wanted"], dense["met"]) == (4.0, 3.3, True)
    peer = found["int4 g128 against every peer"]
    assert (peer["measured"], peer["against"], peer["met"]) == (0.9, "other", False)
    assert len(found) == 2
    assert goals.lines(list(found.values()))[0][2] == "met: worst 4.00 of 3.3 (4096x14336 M=1)"


def test_cusparselt_is_a_goal_for_many_rows():
    rows = [
        row("sparse24_linear", 10.0, m=1024), row("sparse24_linear", 11.0, m=1024, peer="torch.to_sparse"),
        row("sparse24_linear", 10.0), row("sparse24_linear", 9.0, peer="torch.to_sparse"),
    ]  # fmt: skip
    found = [e for e in goals.judged(rows, as_limits(None)) if e["goal"] == "sparse24 against cuSPARSELt"]
    assert [(entry["m"], entry["measured"], entry["met"]) for entry in found] == [(1024, 1.1, True)]


def test_four_of_five_shapes_are_asked_beside_peers():
    def verdict(worse):
        rows = []
        for at, shape in enumerate(plan.GOAL_SHAPES):
            rows.append(row("int8_linear", 10.0, shape=shape))
            rows.append(row("int8_linear", 9.0 if at < worse else 11.0, shape=shape, peer="p"))
        lines = goals.peer_lines(goals.judged(rows, as_limits(None)))
        return next(line for line in lines if line[0].startswith("int8 against"))[1]

    assert verdict(1).startswith("met (4 of 5): worst 0.90")
    assert verdict(2).startswith("not met (3 of 5)")


def test_a_test_that_ends_the_process_is_one_failure(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import os\n\ndef test_one():\n    pass\n\ndef test_two():\n    os._exit(70)\n\n"
        "def test_three():\n    assert 1 == 2\n\ndef test_four():\n    pass\n"
    )
    journal = Journal(tmp_path / "journal")
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path),
        "-p", "bench._gpu.record", "--record", str(journal.path), str(tests),
    ]  # fmt: skip
    outcome = supervise.run(command, tmp_path / "log", 60, env=ENVIRONMENT, journal=journal, finished=gpu.TESTS_DONE)
    found = record.summary(journal.read())
    assert outcome.deaths == ["the process ended with code 70"]
    assert {name: found[name] for name in ("passed", "failed", "died")} == {"passed": 2, "failed": 1, "died": 1}
    bad = {one["test"].split("::")[1]: one["message"] for one in found["failures"]}
    assert bad == {"test_two": "the process ended with code 70", "test_three": "assert 1 == 2"}


def test_what_the_sanitizer_found_is_read_with_its_case():
    text = (
        "int4_linear cuda.mma 64x256 g128 M=1\nint4_linear cuda.mma 33x100 g32 M=3\n"
        "========= Invalid __global__ read of size 16 bytes\n=========     at kernel\n"
        "CASES: 2, WRONG: 1\n========= ERROR SUMMARY: 7 errors\n"
    )
    found = sanitize._read("memcheck", supervise.Outcome(code=9), text, sanitized=True)
    assert (found["found"], found["cases"], found["wrong"], found["skipped"]) == (7, 2, 1, None)
    assert found["first"] == "int4_linear cuda.mma 33x100 g32 M=3: Invalid __global__ read of size 16 bytes"
    text = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitize._read("racecheck", supervise.Outcome(code=0), text, sanitized=True)["found"] == 0
    text = "========= Error: Device not supported. Please refer to the documentation\n"
    found = sanitize._read("memcheck", supervise.Outcome(code=1), text, sanitized=True)
    assert "Device not supported" in found["skipped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_every_tool_of_the_sanitizer_runs_the_driver(tmp_path, monkeypatch):
    """With a sanitizer that finds nothing, and no kernel to run: which is no success."""
    script = tmp_path / "compute-sanitizer"
    script.write_text(
        '#!/bin/sh\nwhile [ "${1#/}" = "$1" ]; do shift; done\necho "========= ERROR SUMMARY: 0 errors"\nexec "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = {"PYTHONPATH": ":".join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    rows = sanitize.run(tmp_path, 120, path, "cuda")
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck", "synccheck"]
    assert {(row["found"], row["cases"], row["skipped"]) for row in rows} == {
        (0, 0, "no kernel of this device runs here")
    }


@pytest.mark.parametrize("m", [1, 17, 40])
def test_the_int8_product_of_torch_is_checked_with_and_without_its_rounding(m):
    weights = Weights(64, 128, 64)
    around, alone = (peer for peer in torch_cuda.PEERS if peer.op == "int8_dynamic_linear")
    for peer, activations in ((around, PER_ROW), (alone, GIVEN)):
        candidate = peers._candidate(peer, weights, torch.bfloat16)
        candidate.layers = [candidate.build(0)]
        x = measure.input_rows(m, 128, torch.bfloat16)
        error = measure.check(candidate, candidate.bind(candidate.layers[0], x), x)
        assert 1e-4 < error < 0.02
        assert candidate.row["activations"] == activations


def test_peers_of_a_gpu_say_what_they_need():
    weights = Weights(32, 128, 64)
    assert weights.packed
    weights.device = "cuda"
    found = list(peers.candidates(weights, torch.float32))
    assert {one.row["peer"] for one in found} >= {
        "torch.dense", "torch._weight_int4pack_mm", "torch._int_mm alone", "torch.to_sparse_semi_structured",
        "humming.int4.kept", "gemlite.int4.kept", "torchao.Int8WeightOnly", "bitsandbytes.nf4",
    }  # fmt: skip
    refused = {one.row["peer"]: one.row["skipped"] for one in found}
    assert refused["torch._weight_int4pack_mm"] == "takes bfloat16, not float32"
    assert refused["torch.dense"] is None
