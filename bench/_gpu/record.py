"""A pytest plugin: `-p bench._gpu.record --record FILE` writes each test's outcome as it comes, and leaves out tests
that the file already has, so that a run that died goes on where it stopped. Works with and without pytest-xdist.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench._gpu.journal import Journal

MESSAGE = 400  # characters of a failure
FILTER = "recorded tests"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="file of the outcomes so far")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is None:
        return
    if hasattr(config, "workerinput"):  # of pytest-xdist: all of them have to find the same tests
        known = set(config.workerinput["recorded"])
        config.pluginmanager.register(Filter(known))
        return
    journal = Journal(Path(path))
    known = tests(journal.read()).keys()
    config.pluginmanager.register(Filter(set(known)), FILTER)
    config.pluginmanager.register(Recorder(journal))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist asks this for every worker, also for one that replaces another."""
    if (known := node.config.pluginmanager.get_plugin(FILTER)) is not None:
        node.workerinput["recorded"] = sorted(known.known)


class Filter:
    """Leaves out the tests that are known."""

    def __init__(self, known: set[str]):
        self.known = known

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.known]


class Recorder:
    """Writes what the tests do."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.journal.write(doing=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            message = "" if report.passed else _message(report)
            self.journal.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)


def _message(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return str(report.longrepr[2])[:MESSAGE]
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else report.longreprtext)[:MESSAGE]


def tests(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """nodeid -> outcome ("passed", "failed", "skipped", "died") and message; of several reports the worst."""
    found: dict[str, dict[str, Any]] = {}
    running: set[str] = set()
    for entry in entries:
        if "doing" in entry:
            running.add(entry["doing"])
        elif "test" in entry:
            running.discard(entry["test"])
            if found.get(entry["test"], {}).get("outcome") != "failed":
                found[entry["test"]] = {key: entry[key] for key in ("outcome", "seconds", "message")}
        elif "died" in entry:
            for nodeid in running:
                found[nodeid] = {"outcome": "died", "seconds": None, "message": entry["died"]}
            running.clear()
    return found


def summary(entries: Sequence[dict[str, Any]], most: int = 100) -> dict[str, Any]:
    """Counts, the reasons of skips, and the failures."""
    outcomes = tests(entries)
    counts = dict.fromkeys(("passed", "failed", "died", "skipped"), 0)
    for one in outcomes.values():
        counts[one["outcome"]] += 1
    skips: dict[str, int] = {}
    for one in outcomes.values():
        if one["outcome"] == "skipped":
            skips[one["message"]] = skips.get(one["message"], 0) + 1
    bad = [{"test": name, **one} for name, one in outcomes.items() if one["outcome"] in ("failed", "died")]
    return {**counts, "skips": skips, "failures": bad[:most], "more_failures": max(0, len(bad) - most)}
