"""The example that prunes, distils and quantizes, on a tiny model."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import corpus, model  # noqa: F401

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "prune_distil_quantize.py"
TINY = ("--mlp", "0.5", "--multiple-of", "8", "--steps", "3", "--batch", "2", "--length", "16", "--samples", "4")
TINY = (*TINY, "--windows", "2", "--recipe", "rtn-int8")


def test_every_step_is_smaller_and_loads(model, corpus, tmp_path, capsys):  # noqa: F811
    torch.manual_seed(3)
    example = SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
    example.main(["--model", str(model), "--text", str(corpus), "--out", str(tmp_path / "out"), *TINY])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:]] == list(example.STEPS)
    args = example.options().parse_args(["--text", str(corpus), "--out", str(tmp_path / "out"), *TINY])
    rows = list(example.measure(args))
    sizes = [row["file_bytes"] for row in rows]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert len({row["perplexity"] for row in rows}) == 4
    assert all(row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 for row in rows)
    configs = [json.loads((tmp_path / "out" / step / "config.json").read_text()) for step in example.STEPS]
    assert [config["intermediate_size"] for config in configs] == [96, 48, 48, 48]
