"""A config.json that nobody vouches for: no memory, no endless loop, one kind of error."""

import json
import time
import tracemalloc

import pytest
import tiny
import torch

import llmkern
from llmkern import skeleton

BAD = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the files hold no more than"),
    "some layers": ({"num_hidden_layers": 4000}, "more than 4096 parameters, which the files do not hold"),
    "labels": ({"num_labels": 10**9}, "num_labels is"),
    "labels by name": ({"id2label": {"0": "a"}, "num_labels": 10**30}, "num_labels is"),
    "a float": ({"num_hidden_layers": 1e300}, "num_hidden_layers is"),
    "inside": ({"sub": {"deep": [{"n_layers": 10**7}]}}, "n_layers is"),
    "width": ({"hidden_size": 10**9}, "values of parameters, which files of"),
    "vocabulary": ({"vocab_size": 10**15}, "values of parameters, which files of"),
    "negative": ({"hidden_size": -64}, "no LlamaForCausalLM is made of it"),
    "zero heads": ({"num_attention_heads": 0, "head_dim": None}, "no LlamaForCausalLM is made of it"),
    "activation": ({"hidden_act": "gel"}, "no LlamaForCausalLM is made of it"),
    "type": ({"model_type": ["llama"]}, "model_type must be a string"),
    "dtype": ({"dtype": "float99"}, "no LlamaForCausalLM is made of it"),
}


def edit(path, changes):
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **changes}))


@pytest.mark.filterwarnings("ignore:load. config.json was changed")
@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_sizes_that_make_no_sense_are_refused_at_once(case, sealed, tmp_path):
    changes, text = BAD[case]
    model = tiny.llama()
    llmkern.patch(model, "rtn-int4-g32")
    llmkern.save(model, tmp_path / "m")
    if not sealed:
        (tmp_path / "m" / "llmkern.json").unlink()
    llmkern.load(tmp_path / "m")
    edit(tmp_path / "m", changes)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ValueError, match=text) as error:
            llmkern.load(tmp_path / "m")
        assert str(error.value).startswith("load: config.json: ")
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
        assert time.process_time() - start < 60
    finally:
        tracemalloc.stop()


def test_buffers_that_no_file_holds_are_refused():
    """As a mask of positions by positions: a few numbers in a configuration, and all of the memory."""
    model = torch.nn.Module()
    model.register_buffer("mask", torch.empty(1 << 14, 1 << 14, dtype=torch.bool, device="meta"))
    skeleton._fits(model, 1 << 20)
    model.register_buffer("mask", torch.empty(1 << 15, 1 << 14, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="buffers of 536870912 bytes, for files of 1048576 bytes"):
        skeleton._fits(model, 1 << 20)


def test_a_change_that_makes_sense_is_said(tmp_path):
    llmkern.save(tiny.llama(), tmp_path / "m")
    edit(tmp_path / "m", {"rms_norm_eps": 1e-3})
    with pytest.warns(UserWarning, match=r"config\.json was changed since it was saved"):
        model = llmkern.load(tmp_path / "m")
    assert model.config.rms_norm_eps == 1e-3
