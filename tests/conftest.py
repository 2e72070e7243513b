"""Options and fixtures of every test: the seed, the level, the kernels of an op that run here."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from types import ModuleType

import emulation
import pytest
import torch
from cases import CASES

import llmkern


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of every random input (default 0)")
    parser.addoption(
        "--fuzz", type=int, default=500, help="damaged folders that are loaded (default 500; 20000 takes minutes)"
    )
    parser.addoption("--device", default="cuda", help="of tests/gpu; cpu is a smoke run (default cuda)")
    parser.addoption("--level", help="run the op tests on this CPU level alone, e.g. avx2")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "of_ops(*names): run with `op`, `row` (each kernel that runs here) and, if asked for, `case`"
    )
    level = config.getoption("--level")
    if level and not any(row.kernel == f"cpu.{level}" and row.runnable for row in llmkern.kernels()):
        raise pytest.UsageError(f"--level {level}: no kernel of that level runs here")
    torch.set_num_threads(1)  # tensors are small here, and torch's pool stalls when the machine is busy


@pytest.fixture(autouse=True)
def threads_are_given_back() -> Iterator[None]:
    """A test that leaves torch with more threads makes all tests after it slow, and none of them says why."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"torch was left with {left} threads"


def pytest_report_header(config: pytest.Config) -> str:
    return f"llmkern: --seed {config.getoption('--seed')}"


def rows(config: pytest.Config, op: str) -> list[str]:
    """The kernels of `op` that run on this machine's CPU, or the one of --level."""
    names = [row.kernel for row in llmkern.kernels(op) if row.runnable and row.device in ("cpu", "any")]
    level = config.getoption("--level")
    return [name for name in names if name == f"cpu.{level}"] if level else names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("of_ops")
    if marker is None:
        return
    pairs = [(op, row) for op in marker.args for row in rows(metafunc.config, op)]
    if "case" in metafunc.fixturenames:
        triples = [(op, row, case) for op, row in pairs for case in CASES[op]]
        metafunc.parametrize("op,row,case", triples, ids=[f"{op}-{row}-{case}" for op, row, case in triples])
    else:
        metafunc.parametrize("op,row", pairs, ids=[f"{op}-{row}" for op, row in pairs])


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of this test's own; pytest shows the printed seed when the test fails."""
    seed = request.config.getoption("--seed") * 1_000_003 + zlib.crc32(request.node.nodeid.encode())
    print(f"generator seed {seed} (--seed {request.config.getoption('--seed')})")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module _cuda whose GPU is emulated, built on first use."""
    return emulation.build()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty fills with NaN (the largest integer, True), so an element that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.ones(2).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
