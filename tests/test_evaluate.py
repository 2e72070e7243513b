"""Perplexity against its definition, and what the measurements count."""

import math
from types import SimpleNamespace

import pytest
import torch

from llmkern import evaluate


class Bigram(torch.nn.Module):
    """A causal LM whose next token depends on the last one only: logits are a row of a table [V, V]."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.calls = []

    def forward(self, input_ids, use_cache, past_key_values=None):
        self.calls.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=object())


@pytest.fixture
def bigram():
    return Bigram(torch.randn(11, 11, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_perplexity_is_the_definition(bigram, batch):
    windows = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    log_p = bigram.table.detach().double().log_softmax(-1)
    losses = [-float(log_p[window[i], window[i + 1]]) for window in windows for i in range(6)]
    found = evaluate.perplexity(bigram, windows, batch=batch)
    assert found.tokens == 30
    assert found.value == pytest.approx(math.exp(sum(losses) / 30), rel=1e-6)
    assert max(shape[0] for shape in bigram.calls) == min(batch, 5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    windows = torch.zeros(2, 9, dtype=torch.int64)
    assert evaluate.perplexity(Bigram(torch.zeros(11, 11)), windows).value == pytest.approx(11)


def test_nan_logits_are_an_error(bigram):
    bigram.table.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="logits hold a NaN"):
        evaluate.perplexity(bigram, torch.full((1, 4), 3))


def test_perplexity_keeps_no_graph_and_no_mode(bigram):
    bigram.train()
    evaluate.perplexity(bigram, torch.zeros(1, 4, dtype=torch.int64))
    assert bigram.training
    assert bigram.table.grad is None


def test_decode_feeds_one_token_at_a_time(bigram):
    assert evaluate.decode_speed(bigram, torch.arange(5), tokens=3) > 0
    assert bigram.calls == [(1, 5), (1, 1), (1, 1), (1, 1)]


def test_prefill_runs_the_whole_window(bigram):
    assert evaluate.prefill_speed(bigram, torch.arange(5), repeats=2) > 0
    assert bigram.calls == [(1, 5)] * 3


def test_bytes_count_parameters_and_buffers_once():
    model = torch.nn.Module()
    model.a = torch.nn.Linear(4, 3, bias=False)
    model.b = torch.nn.Linear(4, 3, bias=False)
    model.b.weight = model.a.weight
    model.register_buffer("codes", torch.zeros(5, dtype=torch.int8))
    assert evaluate.model_bytes(model) == 4 * 3 * 4 + 5


def test_evaluate_has_the_keys_of_the_contract(bigram):
    windows = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(1))
    found = evaluate.evaluate(bigram, windows)
    assert set(found) == {"perplexity", "tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "bytes"}
    assert found["tokens"] == 14
    assert found["bytes"] == 11 * 11 * 4
    unhurried = evaluate.evaluate(bigram, windows, speed=False)
    assert unhurried["prefill_tokens_per_s"] is None
    assert unhurried["perplexity"] == found["perplexity"]
