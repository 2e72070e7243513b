"""Autotuning of the Triton products: what is tried, when, and what is kept. No GPU and no Triton are needed."""

from __future__ import annotations

import time

import pytest

import llmkern
from llmkern.ops import _tuning
from llmkern.ops._tiles import Tiles, tiles

CASES = [
    ((9, 0), 1, 4096, 4096, 128),
    ((8, 0), 512, 576, 1536, 32),
    ((9, 0), 16, 100, 75, 75),
    ((9, 0), 3, 64, 2085, 20),
]


class OutOfResources(Exception):
    """By the name of Triton's."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "_found", {})


def usual_of(case: tuple) -> Tiles:
    return tiles(*case, "half")


@pytest.mark.parametrize("case", CASES)
def test_variants_are_few_different_and_cover_k(case: tuple) -> None:
    usual = usual_of(case)
    found = _tuning.variants(usual)
    assert found[0] == usual
    assert 2 <= len(found) == len(set(found)) <= _tuning.MOST
    for tried in found:
        assert tried.stages >= 2
        assert tried.warps in (4, 8)
        assert tried.per_split * tried.splits >= usual.per_split * usual.splits - usual.per_split + 1
        if usual.per_split % usual.per_group == 0:
            assert tried.per_split % usual.per_group == 0


def test_nothing_is_tried_unasked() -> None:
    usual = usual_of(CASES[0])
    assert _tuning.chosen("key", usual, lambda tried: pytest.fail("tried")) is usual


def test_the_fastest_is_kept_for_its_key_alone() -> None:
    usual = usual_of(CASES[0])
    best = _tuning.variants(usual)[2]
    calls: list[Tiles] = []

    def attempt(tried: Tiles) -> None:
        calls.append(tried)
        time.sleep(0 if tried == best else 0.003)

    with llmkern.autotune():
        assert _tuning.chosen("key", usual, attempt) == best
        count = len(calls)
        assert count == len(_tuning.variants(usual)) * (1 + _tuning.ROUNDS)
        assert _tuning.chosen("key", usual, attempt) == best
    assert _tuning.chosen("key", usual, attempt) == best
    assert len(calls) == count
    assert _tuning.chosen("other", usual, attempt) is usual


def test_blocks_that_do_not_fit_are_passed_over_and_other_errors_are_not() -> None:
    usual = usual_of(CASES[0])

    def no_room(tried: Tiles) -> None:
        if tried != usual:
            raise OutOfResources

    def broken(tried: Tiles) -> None:
        raise ValueError("broken")

    with llmkern.autotune():
        assert _tuning.chosen("key", usual, no_room) == usual
        with pytest.raises(ValueError, match="broken"):
            _tuning.chosen("other", usual, broken)


def test_never_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "_capturing", lambda: True)
    usual = usual_of(CASES[0])
    with llmkern.autotune():
        assert _tuning.chosen("key", usual, lambda tried: pytest.fail("tried")) is usual
    assert not _tuning._found
