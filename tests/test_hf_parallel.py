"""Tensor parallel: two ranks give what one gives, on their shares of the packed layers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmkern import formats
from llmkern.hf import _parallel

pytest.importorskip("transformers")
HERE = Path(__file__).parent
SAME = ("int4", "int4_rows", "int8_asym", "24", "24_int4", "bitmask", "bitmask_int8", "bias", "head", "mixtral",
        "mixtral_24", "phi3", "gpt_oss")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Scenario -> what each rank said; see hf_ranks.py."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, HERE / "hf_ranks.py", tmp_path_factory.mktemp("ranks")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def difference(got, wanted):
    got, wanted = torch.tensor(got["logits"]), torch.tensor(wanted["logits"])
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("scenario", SAME)
def test_two_ranks_give_what_one_gives(runs, scenario):
    wanted, *ranks = runs[scenario]
    assert len(ranks) == 2
    for rank in ranks:
        assert "value" in rank, rank
        assert difference(rank["value"], wanted) < 2e-6
        assert rank["value"]["text"] == wanted["text"]


def test_shares_are_half_of_the_weight(runs):
    shapes = runs["int4"][1]["value"]["layers"]
    assert shapes["model.layers.1.mlp.up_proj"] == [48, 64]
    assert shapes["model.layers.1.mlp.down_proj"] == [64, 48]
    assert runs["head"][1]["value"]["layers"]["lm_head"] == [48, 64]
    experts = runs["mixtral"][1]["value"]["layers"]
    assert experts["model.layers.1.mlp.experts.3.gate_up_proj"] == [32, 64]
    assert experts["model.layers.1.mlp.experts.3.down_proj"] == [64, 16]
    assert runs["gpt_oss"][1]["value"]["layers"]["model.layers.1.mlp.experts.3.down_proj"] == [64, 16]
    notes = runs["int4"][1]["value"]["notes"]["model.layers.1.mlp.up_proj"]
    assert notes == ["tensor parallel: this rank holds [48, 64] of it"]


def test_quantized_activations_are_quantized_by_each_rank_and_the_report_says_so(runs):
    wanted, *ranks = runs["w8a8"]
    for rank in ranks:
        assert 1e-6 < difference(rank["value"], wanted) < 0.05
        assert "each rank quantizes its own columns of x" in rank["value"]["notes"]["model.layers.0.mlp.down_proj"]
        assert len(rank["value"]["notes"]["model.layers.0.mlp.up_proj"]) == 1


REFUSED = {
    "groups": "ValueError: from_pretrained: layer model.layers.0.mlp.down_proj: tensor parallel (rowwise): 48 columns "
    "for each of 2 ranks are not whole groups of 32",
    "saved": "ValueError: save: layer model.layers.0.self_attn.q_proj holds one rank's share of its weight; load it on "
    "one rank",
    "dequantized": "ValueError: dequantize: layer model.layers.0.self_attn.q_proj holds one rank's share of its "
    "weight; load it on one rank",
    "style": "NotImplementedError: from_pretrained: layer model.layers.0.mlp.up_proj: tensor parallel: style "
    "'sequence_parallel' is not known for packed layers",
    "order": "NotImplementedError: from_pretrained: layer model.layers.0.mlp.down_proj: tensor parallel: columns in "
    "an order of their own cannot be shared",
    "mixed": "NotImplementedError: from_pretrained: layer model.layers.0.mlp.experts.0.gate_up_proj: tensor parallel: "
    "model.layers.0.mlp.experts.1.down_proj is dense, and shared with packed experts only",
}


@pytest.mark.parametrize("scenario", REFUSED)
def test_what_cannot_be_shared_is_refused(runs, scenario):
    assert [rank.get("value", rank) for rank in runs[scenario]] == [REFUSED[scenario]] * 2


@pytest.mark.parametrize("kind", ["dp_size", "pp_size", "ep_size"])
def test_other_kinds_of_parallelism_are_refused(kind):
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**{kind: 2, "tp_size": 2})))
    with pytest.raises(NotImplementedError, match=f"tensor parallel only, got {kind}=2"):
        _parallel.rank_of(model)


def test_tensor_parallel_of_another_kind_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(), _tp_size=2)
    with pytest.raises(NotImplementedError, match="needs a newer transformers"):
        _parallel.rank_of(model)
    assert _parallel.rank_of(SimpleNamespace(config=SimpleNamespace())) is None


def weights(n, k, generator):
    w = torch.randn(n, k, generator=generator)
    keep = torch.zeros(n, k // 4, 4).scatter_(2, torch.rand(n, k // 4, 4, generator=generator).argsort(-1)[..., :2], 1)
    half = w * keep.view(n, k)
    bits = w * (torch.rand(n, k, generator=generator) > 0.6)
    return {
        "int8": formats.Int8Weight.pack(w, group_size=16, symmetric=False),
        "int8 rows": formats.Int8Weight.pack(w, group_size=None),
        "int4": formats.Int4Weight.pack(w, group_size=16, symmetric=False),
        "24": formats.Sparse24Weight.pack(half),
        "24 int8": formats.Sparse24Weight.pack(half, dtype=torch.int8, group_size=16),
        "24 int4": formats.Sparse24Int4Weight.pack(half, group_size=16),
        "bitmask": formats.BitmaskWeight.pack(bits),
        "bitmask int8": formats.BitmaskWeight.pack(bits, dtype=torch.int8, group_size=16),
    }


@pytest.mark.parametrize("name", weights(4, 16, torch.Generator().manual_seed(0)))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_put_together_are_the_weight(name, size, generator):
    packed = weights(12 * size, 48 * size, generator)[name]
    ranks = [_parallel.Rank(at, size) for at in range(size)]
    whole = packed.unpack()

    def parts(style):
        shares = [_parallel.share(packed, style, rank, False) for rank in ranks]
        for part in shares:
            type(part).from_tensors(part.tensors(), shape=part.shape, group_size=part.group_size)
        return [part.unpack() for part in shares]

    assert torch.equal(torch.cat(parts("colwise")), whole)
    assert torch.equal(torch.cat(parts("rowwise"), 1), whole)
    up_down = [part.chunk(2) for part in parts("packed_colwise")]
    assert torch.equal(torch.cat([torch.cat(half) for half in zip(*up_down, strict=True)]), whole)


@pytest.mark.parametrize(
    ("style", "shape", "group", "text"),
    [
        ("colwise", (15, 32), 16, "its 15 rows cannot be shared by 2 ranks alike"),
        ("packed_colwise", (30, 32), 16, "its 2 x 15 rows cannot be shared by 2 ranks alike"),
        ("rowwise", (8, 33), 16, "its 33 columns cannot be shared by 2 ranks alike"),
        ("rowwise", (8, 48), 16, "24 columns for each of 2 ranks are not whole groups of 16"),
        ("rowwise", (8, 24), 4, "12 columns for each of 2 ranks are no multiple of 8, which Int4Weight stores"),
    ],
)
def test_shapes_that_do_not_divide_are_refused(style, shape, group, text):
    packed = formats.Int4Weight.pack(torch.randn(shape), group_size=group)
    with pytest.raises(ValueError, match=f"tensor parallel .{style}.: {text}"):
        _parallel.share(packed, style, _parallel.Rank(0, 2), False)
