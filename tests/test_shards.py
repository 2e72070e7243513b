"""Tensors spread over several files: what they hold, the index, and what is refused of it."""

import json

import pytest
import tiny
import torch
from fuzz_damages import forge
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same_model
from test_saving import assert_close, stock

import llmkern
from llmkern import checkpoint, shards, weight_writer


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_shards_hold_what_one_file_holds(kind, tmp_path):
    model = tiny.MODELS[kind]()
    llmkern.patch(model, "rtn-int4-g16")
    llmkern.save(model, tmp_path / "one")
    llmkern.save(model, tmp_path / "m", max_shard_size="20KB")
    names = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    assert names == [f"model-{at:05}-of-{len(names):05}.safetensors" for at in range(1, len(names) + 1)]
    assert len(names) > 3
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    one, found = load_file(tmp_path / "one" / "model.safetensors"), {}
    for name in names:
        shard = load_file(tmp_path / "m" / name)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 20_000
        assert {index["weight_map"][key] for key in shard} == {name}
        found |= shard
    assert found.keys() == one.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], one[key]) for key in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert_same_model(kind, llmkern.load(tmp_path / "m"), model)
    assert checkpoint.check_files(tmp_path / "m") == len(names) + 3
    assert_close(kind, stock(tmp_path / "m"), model)


def test_a_shard_is_all_that_is_in_memory(tmp_path):
    """Of tensors that are made when they are written, the one before is gone when the next is made."""
    alive, most = 0, 0

    def make():
        nonlocal alive, most
        tensor = torch.zeros(1000)
        alive += 1
        most = max(most, alive)

        class Counted(torch.Tensor):
            def __del__(self):
                nonlocal alive
                alive -= 1

        return tensor.as_subclass(Counted)

    tensors = {f"t{at}": weight_writer.Later(torch.float32, torch.Size([1000]), make) for at in range(9)}
    shards.write_shards(tmp_path, tensors, {}, 10_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 5
    assert most <= 2, "at most the tensor that is written and the one that is made"


@pytest.mark.parametrize(
    ("size", "wanted"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200kb", 200_000), (7, 7), ("12", 12), ("2TB", 2 * 10**12)],
)
def test_sizes(size, wanted):
    assert shards.parse_size(size) == wanted


@pytest.mark.parametrize("size", [0, -1, "0GB", "5 apples", "", "GB", None, True, 2.5, "-5GB", "5PB", "nan"])
def test_sizes_that_are_none_are_refused(size, tmp_path):
    with pytest.raises(ValueError, match='max_shard_size must be bytes or such as "5GB"'):
        llmkern.save(tiny.llama(), tmp_path / "m", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


INDEXES = {
    "up": (lambda index, _: index["weight_map"].update(a="../m2/x.safetensors"), "a file name with a folder in it"),
    "absolute": (
        lambda index, _: index["weight_map"].update(a="/etc/x.safetensors"),
        "a file name with a folder in it",
    ),
    "another kind": (lambda index, _: index["weight_map"].update(a="config.json"), "wanted a .safetensors file"),
    "no such file": (lambda index, _: index["weight_map"].update(a="x.safetensors"), "which is not there"),
    "no names": (lambda index, _: index["weight_map"].update(a=3), "wanted JSON with a weight_map"),
    "no map": (lambda index, _: index.pop("weight_map"), "wanted JSON with a weight_map"),
    "a shard left out": (lambda index, shard: leave_out(index["weight_map"], shard), "not there, or not in the index"),
}


def leave_out(weight_map, shard):
    for key in [key for key, name in weight_map.items() if name == shard]:
        del weight_map[key]


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("case", INDEXES)
def test_a_damaged_index_is_refused(case, forged, tmp_path):
    model = tiny.llama()
    llmkern.patch(model, "rtn-int4-g16")
    llmkern.save(model, tmp_path / "m", max_shard_size="20KB")
    shard = min(tmp_path.glob("m/model-*.safetensors"))
    change, text = INDEXES[case]
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index, shard.name)
    path.write_text(json.dumps(index))
    if forged:
        forge(tmp_path / "m")
        if case == "a shard left out":
            text = "missing tensor|the files lack"
            shard.unlink()
            forge(tmp_path / "m")
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        llmkern.load(tmp_path / "m")


def test_an_index_that_was_changed_is_refused(tmp_path):
    llmkern.save(tiny.llama(), tmp_path / "m", max_shard_size="20KB")
    path = tmp_path / "m" / "model.safetensors.index.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"index\.json was changed since it was saved"):
        llmkern.load(tmp_path / "m")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    llmkern.save(tiny.llama(), tmp_path / "m", max_shard_size="20KB")
    names = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    tensors = load_file(tmp_path / "m" / names[0]) | load_file(tmp_path / "m" / names[1])
    save_file(tensors, tmp_path / "m" / names[0])
    forge(tmp_path / "m")
    with pytest.raises(ValueError, match="is in another file as well"):
        llmkern.load(tmp_path / "m")
