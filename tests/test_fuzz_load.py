"""Damaged folders end in a clean error or a correct load: 500 inputs, or as many as --fuzz says.

Each runs in a child process with a limit on memory and on time, so that a crash, a hang or a huge allocation is a
failure with a number: `python tests/fuzz_load.py SEED NUMBER 1` runs that input again.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import llmkern
from llmkern.checkpoint_folder import seal

PART = 2500  # inputs of one process


def run(seed, first, count):
    """Lines of the child, and how it ended."""
    script = Path(__file__).with_name("fuzz_load.py")
    done = subprocess.run(
        [sys.executable, str(script), str(seed), str(first), str(count)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=600 + count,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and alarms as Linux has them")
def test_damaged_folders_end_in_a_clean_error_or_a_correct_load(request):
    inputs, seed = request.config.getoption("--fuzz"), request.config.getoption("--seed")
    print(f"{inputs} inputs of seed {seed}")
    counts = {}
    for part in range(math.ceil(inputs / PART)):
        first = part * PART
        lines, done = run(seed, first, min(PART, inputs - first))
        at = max((line["at"] for line in lines if "at" in line), default=None)
        assert done.returncode == 0, f"died at input {at} of seed {seed} ({done.returncode}): {done.stderr[-2000:]}"
        assert [line for line in lines if "failed" in line] == []
        for result, count in lines[-1]["counts"].items():
            counts[result] = counts.get(result, 0) + count
    print(counts)
    assert sum(counts.values()) == inputs
    # A fuzz that is always refused at the door, or never, tests nothing.
    assert 0.5 * inputs < counts["refused"] < 0.95 * inputs
    assert counts["loaded, the same"]
    assert counts["loaded, of other values"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "m"
    model = tiny.llama(num_hidden_layers=1)
    llmkern.patch(model, llmkern.Recipe.parse("rtn-int4-g32", overrides={"down_proj": "magnitude-0.5"}))
    llmkern.save(model, path)
    return path


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("name", ["llmkern.json", "config.json", "generation_config.json"])
def test_any_value_anywhere_in_a_json_file(name, folder, data):
    """One value becomes any other; a shrunk example says which."""
    original = {file.name: file.read_bytes() for file in folder.glob("*.json")}
    content = json.loads(original[name])
    spot = data.draw(st.sampled_from(places(content)))
    home = content
    for step in spot[:-1]:
        home = home[step]
    home[spot[-1]] = data.draw(VALUES)
    if name == "llmkern.json":
        content["seal"] = seal(content)
    try:
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = llmkern.load(folder)
    except (ValueError, FileNotFoundError) as refusal:
        assert str(refusal).startswith("load: ")  # noqa: PT017
        return
    finally:
        for file, known in original.items():
            (folder / file).write_bytes(known)
    if name != "config.json":
        tiny.output("llama", model, tiny.token_ids(1))
