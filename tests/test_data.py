"""The builtin text, and the windows of calibration and evaluation."""

import sys

import pytest
import torch

from llmkern import data


class Characters:
    """A tokenizer of one token per character."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


IDS = torch.arange(1000)


def test_three_quarters_and_one():
    assert data.calibration_part(IDS).tolist() == list(range(750))
    assert data.evaluation_part(IDS).tolist() == list(range(750, 1000))
    assert data.calibration_part(IDS[:7]).numel() + data.evaluation_part(IDS[:7]).numel() == 7


def test_calibration_windows_come_from_a_seeded_generator():
    windows = data.calibration_windows(IDS, 32, 64, seed=3)
    starts = torch.randint(0, 750 - 64 + 1, (32,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(windows, torch.stack([IDS[s : s + 64] for s in starts]))
    assert torch.equal(windows, data.calibration_windows(IDS, 32, 64, seed=3))
    assert not torch.equal(windows, data.calibration_windows(IDS, 32, 64, seed=4))
    assert int(windows.max()) < 750


def test_calibration_leaves_torchs_own_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    data.calibration_windows(IDS, 4, 8, seed=1)
    assert torch.equal(torch.rand(3), wanted)


def test_evaluation_windows_are_consecutive_from_the_last_quarter():
    assert torch.equal(data.evaluation_windows(IDS, 3, 50), torch.arange(750, 900).view(3, 50))


def test_evaluation_takes_as_many_whole_windows_as_there_are():
    assert torch.equal(data.evaluation_windows(IDS, 16, 100), torch.arange(750, 950).view(2, 100))


def test_a_window_may_be_the_whole_part():
    assert data.calibration_windows(IDS, 2, 750).tolist() == [list(range(750))] * 2
    assert data.evaluation_windows(IDS, 1, 250).tolist() == [list(range(750, 1000))]


@pytest.mark.parametrize("cut", [data.calibration_windows, data.evaluation_windows])
def test_a_text_shorter_than_one_window_is_refused(cut):
    with pytest.raises(ValueError, match="text is shorter than one window: wanted 800 tokens, got"):
        cut(IDS, 1, 800)


@pytest.mark.parametrize("cut", [data.calibration_windows, data.evaluation_windows])
@pytest.mark.parametrize(("samples", "seqlen"), [(0, 8), (4, 1), (-1, 8)])
def test_no_windows_are_refused(cut, samples, seqlen):
    with pytest.raises(ValueError, match="wanted at least 1 window of at least 2 tokens"):
        cut(IDS, samples, seqlen)


def test_zero_tokens_are_refused():
    with pytest.raises(ValueError, match="shorter than one window"):
        data.calibration_windows(IDS[:0], 1, 2)


def test_token_ids_have_no_special_tokens():
    ids = data.token_ids(Characters(), "ab")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [97, 98]


def test_builtin_text_is_the_topics_in_order():
    from pydoc_data.topics import topics

    text = data.builtin_text()
    first, second = sorted(topics)[:2]
    assert text.startswith(topics[first] + "\n\n" + topics[second])
    assert len(text) == sum(map(len, topics.values())) + 2 * (len(topics) - 1)
    assert data.read_text("builtin") == text


def test_a_file_is_read_as_utf8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ein schöner Text", encoding="utf-8")
    assert data.read_text(str(path)) == "ein schöner Text"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt': no such file"):
        data.read_text(str(tmp_path / "nothing.txt"))


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        data.read_text(str(path))


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        data.read_text(str(path))


def test_hub_text_without_datasets_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="'hf:wikitext' needs the datasets package: pip install datasets"):
        data.read_text("hf:wikitext")
