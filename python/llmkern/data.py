"""Text as token ids: the builtin text, files and hub data sets, and the windows for calibration and evaluation.

The first three quarters of a text's tokens are for calibration, the last quarter for evaluation, so that no window is
ever in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def builtin_text() -> str:
    """CPython's own documentation: in every Python, so nothing is downloaded. Differs a little between versions."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def read_text(source: str) -> str:
    """The text of `source`: "builtin", a UTF-8 file, or "hf:NAME" (the `text` column of a hub data set's train split).

    Raises FileNotFoundError, ValueError for a file that is not text or holds none, and ImportError when hf: needs the
    missing package.
    """
    if source == "builtin":
        return builtin_text()
    if source.startswith("hf:"):
        return _hub_text(source.removeprefix("hf:"))
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"text {source!r}: no such file (wanted builtin, a text file, or hf:NAME)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {source!r}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"text {source!r}: the file holds no text")
    return text


def _hub_text(name: str) -> str:
    """The `text` column of NAME or NAME:CONFIG, rows joined by blank lines."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"text 'hf:{name}' needs the datasets package: pip install datasets") from None
    dataset, _, config = name.partition(":")
    rows = load_dataset(dataset, config or None, split="train")
    if "text" not in rows.column_names:
        raise ValueError(f"text 'hf:{name}': no column 'text', got {', '.join(rows.column_names)}")
    return "\n\n".join(row for row in rows["text"] if row.strip())


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """The whole text tokenized once without special tokens: int64 [T]."""
    # verbose=False: a text longer than the model's context is meant, windows are cut from it.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def calibration_part(ids: Tensor) -> Tensor:
    """The first three quarters of ids [T]."""
    return ids[: ids.numel() * 3 // 4]


def evaluation_part(ids: Tensor) -> Tensor:
    """The last quarter of ids [T]."""
    return ids[ids.numel() * 3 // 4 :]


def calibration_windows(ids: Tensor, samples: int, seqlen: int, seed: int = 0) -> Tensor:
    """[samples, seqlen]: windows at random starts in the first three quarters of ids [T]; the same for the same seed.

    Raises ValueError when that part is shorter than one window.
    """
    part = _long_enough("calibration", calibration_part(ids), samples, seqlen)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, part.numel() - seqlen + 1, (samples,), generator=generator)
    return torch.stack([part[start : start + seqlen] for start in starts.tolist()])


def evaluation_windows(ids: Tensor, windows: int, seqlen: int) -> Tensor:
    """[n, seqlen]: consecutive windows from the start of the last quarter of ids [T].

    n is `windows`, or as many whole windows as there are. Raises ValueError when there is not even one.
    """
    part = _long_enough("evaluation", evaluation_part(ids), windows, seqlen)
    n = min(windows, part.numel() // seqlen)
    return part[: n * seqlen].view(n, seqlen)


def _long_enough(what: str, part: Tensor, windows: int, seqlen: int) -> Tensor:
    if windows < 1 or seqlen < 2:
        raise ValueError(f"{what}: wanted at least 1 window of at least 2 tokens, got {windows} of {seqlen}")
    if part.numel() < seqlen:
        raise ValueError(f"{what}: the text is shorter than one window: wanted {seqlen} tokens, got {part.numel()}")
    return part
