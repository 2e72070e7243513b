"""GGUF files as input: their header, the dense model that they mean, the commands, and what is refused."""

import json
import struct

import pytest
import tiny_gguf
import torch
from test_cli import refused, run, text  # noqa: F401

import llmkern
from llmkern import gguf_header, gguf_models
from llmkern.models import load_model, open_skeleton

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the one file, and the dense model that it means."""
    folder = tmp_path_factory.mktemp("gguf")
    return folder / "tiny.gguf", tiny_gguf.write(folder / "tiny.gguf")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(text(800), encoding="utf-8")
    return path


def ids():
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def test_block_sizes_are_those_of_the_package():
    for number, (name, values, size) in gguf_header.TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (values, size))


def test_the_header_is_that_of_the_package(tiny):
    header = gguf_header.read(tiny[0])
    theirs = gguf.GGUFReader(tiny[0])
    assert header.architecture == "llama"
    assert {t.tensor_type.name for t in theirs.tensors} == set(tiny_gguf.KINDS)
    assert header.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        own = header.tensors[tensor.name]
        assert own[:4] == (
            tensor.tensor_type.name,
            tuple(tensor.shape.tolist()[::-1]),
            tensor.n_bytes,
            tensor.data_offset,
        )
    assert header.metadata["llama.attention.head_count_kv"] == 2
    assert header.metadata["tokenizer.ggml.tokens"] == 259


@pytest.mark.parametrize("how", ["file", "folder"])
def test_logits_are_those_of_the_dense_model(tiny, how):
    path, reference = tiny
    model, tokenizer = load_model(str(path if how == "file" else path.parent))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, reference(ids()).logits, rtol=0, atol=0)
    assert tokenizer("then", add_special_tokens=False)["input_ids"] == [257, tiny_gguf.byte_tokens().index("n")]


def test_a_file_is_gone_through_once(tiny, monkeypatch):
    """transformers reads it for the configuration, the tokenizer and the model, and makes a table per module."""
    import gguf

    asked = []

    def counted(name):
        make = getattr(gguf, name)
        monkeypatch.setattr(gguf, name, lambda *args: asked.append(name) or make(*args))
        return getattr(gguf, name)

    watched = {name: counted(name) for name in ("GGUFReader", "get_tensor_name_map")}
    load_model(str(tiny[0]))
    assert sorted(asked) == sorted(watched)
    assert all(getattr(gguf, name) is there for name, there in watched.items())


def test_a_model_from_gguf_compresses_saves_and_loads(tiny, tmp_path):
    model = load_model(str(tiny[0])).model
    llmkern.compress(model, "rtn-int8", progress=False)
    llmkern.save(model, tmp_path / "out")
    again = llmkern.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_the_skeleton_has_the_models_shapes(tiny):
    skeleton = open_skeleton(str(tiny[0]))
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in tiny[1].named_parameters()}
    assert all(p.is_meta for p in skeleton.parameters())


def test_commands(run, tiny, corpus, tmp_path):  # noqa: F811
    code, out, err = run("plan", tiny[0], "--recipe", "rtn-int8", "--json")
    assert code == 0, err
    assert len(json.loads(out)["layers"]) == 14
    code, out, err = run("eval", tiny[0], "--text", corpus, "--seqlen", 16, "--windows", 2, "--json")
    assert code == 0, err
    dense = json.loads(out)["perplexity"]
    code, out, err = run("compress", tiny[0], "--recipe", "rtn-int8", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    code, out, err = run("eval", tmp_path / "out", "--text", corpus, "--seqlen", 16, "--windows", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["perplexity"] == pytest.approx(dense, rel=0.01)


def test_demo_on_a_gguf_file(run, tiny, tmp_path):  # noqa: F811
    command = ("demo", "--model", tiny[0], "--out", tmp_path / "demo", "--samples", 1, "--windows", 1, "--seqlen", 16)
    code, out, err = run(*command, "--json")
    assert code == 0, err
    rows = {row["recipe"]: row for row in json.loads(out)["rows"]}
    assert rows["rtn-int8"]["perplexity"] == pytest.approx(rows["dense"]["perplexity"], rel=0.02)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_factors_become_its_rope_scaling(tmp_path, factor):
    """What llama.cpp writes for Llama 3.1 is 1 / (the share of the frequency that transformers keeps)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(**tiny_gguf.SIZES, rope_parameters=scaled)
    kept, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    tiny_gguf.write(tmp_path / "m.gguf", extra={"rope_freqs.weight": (plain / kept).numpy()})
    model = load_model(str(tmp_path / "m.gguf")).model
    assert model.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, kept)


def test_other_factors_are_refused(tmp_path):
    tiny_gguf.write(tmp_path / "m.gguf", extra={"rope_freqs.weight": [1, 1, 1, 1, 2, 3, 4, 5]})
    with pytest.raises(ValueError, match=r"m\.gguf: rope_freqs\.weight are not the factors of Llama 3"):
        load_model(str(tmp_path / "m.gguf"))


def test_an_unknown_architecture(run, tmp_path):  # noqa: F811
    tiny_gguf.write(tmp_path / "m.gguf", architecture="wavtokenizer-dec")
    refused(run("eval", tmp_path / "m.gguf"), 1, "m.gguf", "architecture wavtokenizer-dec is not supported")
    refused(run("plan", tmp_path / "m.gguf", "--recipe", "rtn-int8"), 1, "m.gguf", "wavtokenizer-dec")


def test_a_missing_tensor_is_refused_and_not_made_up(run, tmp_path):  # noqa: F811
    tiny_gguf.write(tmp_path / "m.gguf", leave_out=("blk.1.ffn_up",))
    refused(run("eval", tmp_path / "m.gguf"), 1, "no tensor for 1 parameters", "model.layers.1.mlp.up_proj.weight")


def test_a_tensor_too_many_is_refused(run, tmp_path):  # noqa: F811
    tiny_gguf.write(tmp_path / "m.gguf", extra={"blk.0.attn_q.bias": [0.0] * 64})
    refused(run("eval", tmp_path / "m.gguf"), 1, "no place for 1 tensors", "blk.0.attn_q.bias")


def test_a_tensor_of_another_shape_is_refused(run, tmp_path):  # noqa: F811
    wrong = {"blk.0.ffn_norm.weight": [1.0] * 32}
    tiny_gguf.write(tmp_path / "m.gguf", leave_out=("blk.0.ffn_norm",), extra=wrong)
    refused(run("eval", tmp_path / "m.gguf"), 1, "m.gguf")


def test_which_file(run, tiny, tmp_path):  # noqa: F811
    refused(run("eval", tmp_path / "no.gguf"), 1, "no.gguf", "no such file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(tiny[0].read_bytes())
    refused(run("eval", tmp_path), 1, "2 GGUF files", "a.gguf")
    refused(run("compress", tiny[0], "--recipe", "rtn-int8", "--out", tmp_path / "o", "--stream", "on"), 2, "streamed")


def test_one_part_of_several_is_refused(tiny, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="one part of 3"):
        gguf_models.read(tmp_path / "m.gguf")


def entry(name, shape, kind, offset):
    encoded = name.encode()
    return struct.pack(f"<Q{len(encoded)}sI{len(shape)}QIQ", len(encoded), encoded, len(shape), *shape, kind, offset)


def raw(tensors, data, *, metadata=b"", keys=0, version=3, count=None):
    arch = struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"llama")
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors) if count is None else count, 1 + keys)
    body = head + arch + metadata + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + b"\0" * data


HUGE = 1 << 62
BROKEN = [
    ("empty", b"", "ends inside its header"),
    ("no magic", b"GGML" + b"\0" * 40, "does not start with GGUF"),
    ("version", raw([], 0, version=9), "version 9"),
    ("big endian", struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "version 50331648"),
    ("no architecture", struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "no general.architecture"),
    ("counts", raw([], 0, count=HUGE), f"a count of {HUGE}"),
    ("many keys", raw([], 64, keys=HUGE - 1), f"a count of {HUGE}"),
    ("long name", raw([struct.pack("<Q", HUGE)], 64), f"a text of {HUGE} bytes"),
    ("cut off", raw([entry("a", [32, 2], 0, 0)], 100), "tensor 'a' ends at byte"),
    ("overflow", raw([entry("a", [HUGE, 8], 0, 0)], 256), "tensor 'a' ends at byte"),
    ("far offset", raw([entry("a", [32], 0, (1 << 64) - 32)], 256), "tensor 'a' ends at byte"),
    ("unaligned", raw([entry("a", [32], 0, 4)], 256), "offset 4 is not a multiple of 32"),
    ("type", raw([entry("a", [32], 4, 0)], 256), "unknown type 4"),
    ("part of a block", raw([entry("a", [33], 8, 0)], 256), "not whole blocks of 32"),
    ("no dimensions", raw([entry("a", [], 0, 0)], 256), "0 dimensions"),
    ("dimensions", raw([entry("a", [1] * 5, 0, 0)], 256), "5 dimensions"),
    ("twice", raw([entry("a", [8], 0, 0), entry("a", [8], 0, 32)], 256), "tensor 'a' twice"),
    ("overlap", raw([entry("a", [16], 0, 0), entry("b", [8], 0, 32)], 256), "'a' and 'b' overlap"),
    ("value", raw([], 0, keys=1, metadata=struct.pack("<Q1sI", 1, b"k", 77)), "unknown type 77"),
    ("array", raw([], 64, keys=1, metadata=struct.pack("<Q1sIIQ", 1, b"k", 9, 4, HUGE)), f"a count of {HUGE}"),
    ("nested", raw([], 64, keys=1, metadata=struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1)), "unknown type 9"),
    ("alignment", raw([], 64, keys=1, metadata=struct.pack("<Q17sII", 17, b"general.alignment", 4, 0)), "power of two"),
    ("blocks", raw([], 64, keys=1, metadata=struct.pack("<Q17sII", 17, b"llama.block_count", 4, 9)), "block_count of"),
    ("text", raw([], 64, keys=1, metadata=struct.pack("<Q1sIQ1s", 1, b"k", 8, 1, b"\xff")), "not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "why"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_file_is_refused_in_one_line(run, tmp_path, data, why):  # noqa: F811
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.gguf: not a GGUF file") as error:
        gguf_header.read(path)
    assert why in str(error.value)
    refused(run("eval", path), 1, "m.gguf", why)


def test_mutated_files_end_in_an_error_or_a_header(tiny, tmp_path):
    """Bytes of the header changed at random: never another exception, never a tensor outside the file."""
    data = tiny[0].read_bytes()
    start = min(tensor.offset for tensor in gguf_header.read(tiny[0]).tensors.values())
    random = torch.Generator().manual_seed(0)
    read = 0
    for _ in range(300):
        changed = bytearray(data)
        for at in torch.randint(0, start, (2,), generator=random).tolist():
            changed[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=random))
        path = tmp_path / "m.gguf"
        path.write_bytes(changed)
        try:
            header = gguf_header.read(path)
        except ValueError:
            continue
        read += 1
        assert all(t.offset >= 0 and t.offset + t.nbytes <= len(data) for t in header.tensors.values())
    assert 0 < read < 300
