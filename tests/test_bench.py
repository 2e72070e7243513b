"""The benchmark itself: what it times is right, its rows are complete, its goals are judged by what was measured."""

import itertools
import json
import time
from xml.etree import ElementTree

import pytest
import torch

import llmkern_cli
from bench import results
from llmkern import _features
from llmkern_cli._bench import generate, goals, limits, measure, ours, peers, plot, shapes, timing
from llmkern_cli._bench.candidate import CLASSES, KEPT, PER_GROUP, PER_ROW
from llmkern_cli._bench.peers import ggml, xnnpack
from llmkern_cli._bench.weights import Weights, whole

LIMITS = {"read_gb_s": 10.0, "float32_gop_s": 100.0, "bfloat16_gop_s": 100.0, "int8_gop_s": 200.0, "peaks": {}}
KEYS = {
    "op", "kernel", "peer", "n", "k", "m", "group_size", "dtype", "activations", "threads", "median_us", "spread",
    "limit_share", "ratio_to_dense", "error", "skipped",
}  # fmt: skip
TORCH_ONLY = ("torch_dense", "torch_packed", "torch_dynamic")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few copies, and limits from a moment: what is tested here is not the speed."""
    monkeypatch.setattr(timing, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits.measure, "__kwdefaults__", {"read_bytes": 1 << 20, "run_seconds": 1e-5})


def test_shapes_by_name_and_by_size():
    assert shapes.parse("smollm2,576x576,3x4") == [(576, 576), (192, 576), (1536, 576), (576, 1536), (3, 4)]
    assert shapes.parse("4096,128") == [(4096, 128)]
    for text in ("nonsense", "3x", "3x4x5", "", "0x4"):
        with pytest.raises(ValueError, match="wanted NxK or one of smollm2"):
            shapes.parse(text)


def test_every_candidate_is_timed_in_every_round_on_the_next_copy():
    order = []
    calls = {name: [lambda name=name, at=at: order.append((name, at)) for at in range(3)] for name in "ab"}
    bursts = {"a": timing.Burst(0, 1), "b": timing.Burst(1, 2)}
    found = timing.interleaved(calls, bursts, seconds=0)
    assert found["a"].rounds == timing.FEWEST_ROUNDS
    assert [name for name, _ in order] == ["a", "b", "b", "b"] * timing.FEWEST_ROUNDS
    assert [at for name, at in order if name == "a"] == [0, 1, 2, 0, 1]
    for name in "ab":
        numbers = [at for who, at in order if who == name]
        assert numbers == list(itertools.islice(itertools.cycle(range(3)), len(numbers)))
    assert 0 < found["a"].least_us <= found["a"].median_us


def test_a_burst_is_long_enough_for_the_clock():
    burst = timing.burst(lambda: None)
    assert burst.timed > 100
    assert burst.lead_in > 5 * burst.timed
    assert burst.calls == burst.timed + burst.lead_in


def test_a_long_call_needs_no_lead_in_and_one_interrupted_call_does_not_look_long(monkeypatch):
    monkeypatch.setattr(timing, "LONG_SECONDS", 2e-2)  # far above what a sleep takes longer on a busy machine
    assert timing.burst(lambda: time.sleep(3e-2)) == timing.Burst(0, 1)
    lengths = iter([5e-2, 1e-3, 1e-4, 1e-4])
    burst = timing.burst(lambda: time.sleep(next(lengths, 1e-4)))
    assert burst.lead_in > 1


def test_copies_are_built_until_enough_is_read_between_two_uses(monkeypatch):
    monkeypatch.setattr(timing, "burst", lambda call: timing.Burst(1, 2))
    candidate = next(peers.candidates(Weights(32, 64, 32), torch.float32, ("torch_dense",)))
    few, many = (32 * 64 * 4 * copies for copies in (5, 50))
    for cold, least in ((few, 5), (many, 50)):
        monkeypatch.setattr(timing, "COLD_BYTES", cold)
        (row,) = measure.measure([candidate], [1], LIMITS, seconds=0)
        assert row["copies"] == len(candidate.layers) >= least
        assert row["rotated_bytes"] > cold
    candidate.most_copies = 4
    (row,) = measure.measure([candidate], [1], LIMITS, seconds=0)
    assert row["copies"] == 4


def test_summary():
    found = timing.summary([1e-6, 2e-6, 3e-6, 4e-6, 100e-6])
    assert found.median_us == pytest.approx(3)
    assert found.least_us == pytest.approx(1)
    assert found.spread == pytest.approx(2 / 3)


def test_the_limits_name_every_usable_level():
    found = limits.measure()
    if _features.native is None:
        assert found["read_gb_s"] is None
        return
    usable = {level.name for level in _features.levels() if level.available}
    assert set(found["peaks"]) == usable
    assert found["read_gb_s"] > 0
    assert found["float32_gop_s"] == max(peak.get("float32", 0) for peak in found["peaks"].values())
    assert found["bfloat16_gop_s"] >= found["float32_gop_s"]
    assert all(rate > 0 for peak in found["peaks"].values() for rate in peak.values())


@pytest.mark.skipif(_features.native is None, reason="the native module is not built")
def test_operations_are_counted_per_round_and_thread():
    one = _features.native.peaks.baseline.multiply_add(0, 1, 1)
    assert one > 0
    assert _features.native.peaks.baseline.multiply_add(0, 1, 2) == 2 * one
    assert _features.native.peaks.baseline.multiply_add(1, 1, 1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_checked_timed_and_complete(dtype):
    weights = Weights(64, 256, 64)
    candidates = [
        *peers.candidates(weights, dtype, TORCH_ONLY),
        *ours.candidates(weights, dtype, ours.OP_NAMES, "best"),
    ]
    rows = measure.measure(candidates, [1, 8], LIMITS, seconds=0)
    assert len(rows) == 2 * len(candidates)
    assert {row["op"] for row in rows} == {"linear", *ours.OP_NAMES}
    for row in rows:
        assert set(row) >= KEYS
        assert (row["kernel"] is None) != (row["peer"] is None)
        assert row["activations"] in CLASSES
        if row["skipped"]:
            assert row["peer"]
            assert row["median_us"] is None
            continue
        assert row["median_us"] > 0
        assert row["ratio_to_dense"] > 0
        assert 0 <= row["error"] < 0.03
        assert row["limit_share"] > 0
        assert row["bound"] in ("read", "compute")
        assert row["rotated_bytes"] > 0
    assert all(row["skipped"] is None for row in rows if row["kernel"])
    assert [row["skipped"] for row in rows if row["peer"] == "torch.dense"] == [None, None]
    ElementTree.fromstring(plot.render(rows))


def test_all_kernels_are_forced_and_refusals_are_rows():
    weights = Weights(32, 64, 32)
    found = list(ours.candidates(weights, torch.float32, ["int8_linear"], "all"))
    rows = measure.measure(found, [2], LIMITS, seconds=0)
    assert all(bool(row["median_us"]) != bool(row["skipped"]) for row in rows)
    if _features.native is not None:
        assert "cpu.baseline" in {row["kernel"] for row in rows if row["median_us"]}


def test_a_wrong_result_is_not_timed():
    weights = Weights(32, 64, 32)
    candidate = next(peers.candidates(weights, torch.float32, ("torch_dense",)))
    candidate.exact = candidate.exact * 1.01
    (row,) = measure.measure([candidate], [8], LIMITS, seconds=0)
    assert row["median_us"] is None
    assert "wrong result: relative error 9" in row["skipped"]


def test_a_failing_peer_is_a_row_with_its_reason():
    def build(rolled, dtype):
        raise OSError("no such\nthing")

    peer = peers.Peer("broken", "int4_linear", build, lambda layer, x: None)
    (row,) = measure.measure([peers._candidate(peer, Weights(32, 64, 32), torch.float32)], [1], LIMITS, seconds=0)
    assert row["skipped"] == "OSError: no such thing"


def test_a_missing_peer_is_a_row_with_its_reason():
    peer = peers.Peer("absent", "int4_linear", None, None, needs=("no_such_package",))
    candidate = peers._candidate(peer, Weights(32, 64, 32), torch.float32)
    assert candidate.row["skipped"].startswith("no_such_package cannot be imported")


def test_every_file_of_peers_says_what_it_needs():
    weights = Weights(32, 128, 64)
    for dtype in (torch.float32, torch.bfloat16):
        found = list(peers.candidates(weights, dtype))
        assert len({candidate.row["peer"] for candidate in found}) == len(found)
        for candidate in found:
            assert candidate.row["activations"] in CLASSES
            assert (candidate.exact is None) == bool(candidate.row["skipped"])


@pytest.mark.parametrize("bits", [4, 8])
def test_ggml_blocks_hold_the_codes_exactly(bits):
    weights = Weights(16, 128, 64)
    blocks = ggml._blocks(weights.rolled(0), bits)
    assert blocks.shape == (16, 4, 18 if bits == 4 else 34)
    scales, values = blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:]
    codes = torch.cat([values & 15, values >> 4], -1).float() - 8 if bits == 4 else values.view(torch.int8).float()
    assert torch.equal((codes * scales).view(16, 128), weights.exact(f"int{bits}"))


def test_xnnpack_multiplies_the_rounded_rows():
    weights = Weights(16, 64, 32)
    x = measure.input_rows(3, 64, torch.float32)
    pytest.importorskip("torchao.quantization.quant_primitives")
    layer = xnnpack._Linear(weights.codes4, weights.scales4, 4)
    exact = x @ weights.exact("int4").T
    assert 1e-4 < float((layer(x) - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(("name", "package"), [("ggml", "llama_cpp"), ("xnnpack", "executorch")])
def test_a_peer_of_int8_activations_is_checked_and_timed(name, package):
    pytest.importorskip(package)
    found = list(peers.candidates(Weights(32, 128, 64), torch.float32, (name,)))
    rows = measure.measure(found, [1, 3], LIMITS, seconds=0)
    assert [row["skipped"] for row in rows] == [None] * 4
    assert {row["activations"] for row in rows} == {PER_GROUP if name == "ggml" else PER_ROW}
    if name == "ggml":
        assert {row["group_size"] for row in rows} == {32}


@pytest.mark.parametrize(("name", "group_size", "k"), [("ggml", 16, 64), ("ggml", 32, 40), ("xnnpack", 16, 64)])
def test_blocks_of_32_columns_are_asked_for(name, group_size, k):
    files = {"ggml": ggml, "xnnpack": xnnpack}
    assert "of 32" in files[name].PEERS[0].refuses(Weights(32, k, group_size))


def test_the_listed_peers_are_all_there():
    found = {candidate.row["peer"] for candidate in peers.candidates(Weights(32, 128, 64), torch.float32)}
    assert {
        "torch.dense", "torch.dense.prepacked", "torch._weight_int4pack_mm_for_cpu", "torch._weight_int8pack_mm",
        "torch.quantized.linear_dynamic", "onnxruntime.MatMulNBits.level0", "onnxruntime.MatMulNBits.level4",
        "onnxruntime.DynamicQuantizeMatMul", "openvino.int4.kept", "openvino.int4.group128", "openvino.int8.kept",
        "openvino.int8.row", "ark.int4.kept", "ark.int4.int8", "ark.int8.kept", "ark.int8.int8", "xnnpack.qd8.qb4w",
        "xnnpack.qd8.qc8w", "ggml.q4_0", "ggml.q8_0",
    } <= found  # fmt: skip


def test_group_sizes_divide_where_they_can():
    assert [whole(128, k) for k in (4096, 576, 96, 100, 24)] == [128, 64, 32, 100, 24]


def test_copies_differ_and_hold_the_same_values():
    weights = Weights(8, 32, 16)
    one, two = weights.rolled(0), weights.rolled(1)
    assert torch.equal(one.codes4, weights.codes4)
    assert not torch.equal(two.codes4, one.codes4)
    assert torch.equal(two.codes4.roll(-1, 0), one.codes4)


def row(
    op, median_us, *, m=1, peer=None, activations=KEPT, dtype="float32", values="int4", n=4096, k=4096, limit_share=None
):
    return {
        "op": op, "peer": peer, "kernel": None if peer else "cpu.x", "n": n, "k": k, "m": m, "dtype": dtype,
        "activations": activations, "values": values, "median_us": median_us, "bytes": n * k // 2,
        "operations": 2 * m * n * k, "limit_share": limit_share,
    }  # fmt: skip


def test_goals_compare_with_the_best_peer_of_the_same_class():
    rows = [
        row("int4_linear", 100.0),
        row("int4_linear", 300.0, peer="slow"),
        row("int4_linear", 170.0, peer="best", dtype="bfloat16"),
        row("int4_linear", 10.0, peer="other class", activations=PER_ROW),
        row("int4_linear", 10.0, peer="other M", m=4),
    ]
    (entry,) = goals.judge(rows, LIMITS)
    assert (entry["goal"], entry["kind"]) == ("int4, activations kept", "ratio")
    assert (entry["against"], entry["wanted"], entry["measured"], entry["met"]) == ("best", 1.6, 1.7, True)


def test_a_ratio_says_which_share_of_the_limit_it_needs():
    """The limit's time over the wanted one, whatever our own time is: 60 us over 170 / 1.6, 150 / 2 and 100 / 2."""
    rows = [
        row("int4_linear", 120.0, limit_share=0.5), row("int4_linear", 170.0, peer="best"),
        row("int4_linear", 80.0, m=4, limit_share=0.75), row("int4_linear", 150.0, m=4, peer="best"),
        row("int4_linear", 100.0, m=64, limit_share=0.6), row("int4_linear", 100.0, m=64, peer="best"),
    ]  # fmt: skip
    judged = goals.judge(rows, LIMITS)
    assert [entry["share_needed"] for entry in judged] == pytest.approx([0.565, 0.8, 1.2], abs=1e-3)
    assert goals.reach(judged).endswith("of the machine's limit: 1 more than 100%, 1 more than 90%")
    judged[1]["share_needed"] = 0.95
    assert goals.reach(judged).startswith("3 ratios are not met.")
    assert goals.reach(judged).endswith("1 more than 100%, 2 more than 90%")


def test_no_share_is_needed_where_ratios_are_met_or_the_limit_is_not_known():
    rows = [row("int4_linear", 100.0, limit_share=0.9), row("int4_linear", 300.0, peer="best")]
    assert goals.reach(goals.judge(rows, LIMITS)) == ""
    rows = [row("int4_linear", 300.0), row("int4_linear", 300.0, peer="best")]
    judged = goals.judge(rows, LIMITS)
    assert [(entry["met"], entry["share_needed"]) for entry in judged] == [(False, None)]
    assert goals.reach(judged) == ""


def test_goals_of_shares_and_of_large_shapes():
    rows = [row("int4_linear", 2000.0, activations=PER_GROUP), row("int4_linear", 900.0, n=64, activations=PER_GROUP)]
    (entry,) = goals.judge(rows, LIMITS)
    assert entry["kind"] == "share of read bandwidth"
    assert entry["measured"] == pytest.approx(4096 * 4096 / 2 / 10e9 / 2000e-6, abs=1e-3)
    assert not entry["met"]


def test_sparse_goals_are_against_our_own_and_per_dtype():
    rows = [
        row("sparse24_int4_linear", 100.0), row("int4_linear", 130.0),
        row("sparse24_int4_linear", 100.0, dtype="bfloat16"), row("int4_linear", 110.0, dtype="bfloat16"),
        row("sparse24_linear", 100.0, dtype="bfloat16"), row("linear", 150.0, dtype="bfloat16", peer="torch.dense"),
    ]  # fmt: skip
    found = {(entry["goal"], entry["dtype"]): entry for entry in goals.judge(rows, LIMITS)}
    assert found["sparse24_int4 against our int4", "float32"]["met"]
    assert not found["sparse24_int4 against our int4", "bfloat16"]["met"]
    assert found["sparse24 bf16 against torch's dense bf16", "bfloat16"]["measured"] == 1.5
    lines = goals.cells(list(found.values()))
    assert [line[0] for line in lines] == list(dict.fromkeys(goal for goal, _ in found))
    assert any("not met (1 of 2): worst 1.10 of 1.2 (4096x4096 M=1)" in line[2] for line in lines)


def test_without_a_level_above_avx2_the_goal_is_the_best_peer():
    rows = [row("int4_linear", 100.0), row("int4_linear", 101.0, peer="best")]
    (entry,) = goals.judge(rows, {**LIMITS, "peaks": {"baseline": {}, "avx2": {}}})
    assert (entry["wanted"], entry["met"]) == (1.0, True)
    rows = [row("int4_linear", 2000.0, activations=PER_GROUP)]
    assert goals.judge(rows, {**LIMITS, "peaks": {"baseline": {}, "avx2": {}}}) == []


def test_the_plot_has_a_panel_per_class_and_dense_in_each():
    rows = [
        row("linear", 100.0, peer="torch.dense", values="float32"), row("int4_linear", 50.0),
        row("int4_linear", 40.0, activations=PER_GROUP), row("linear", 90.0, peer="torch.dense", dtype="bfloat16"),
    ]  # fmt: skip
    texts = [text.text for text in ElementTree.fromstring(plot.render(rows)).iter() if text.tag.endswith("}text")]
    assert "activations kept, float32" in texts
    assert "activations int8 per group" in texts
    assert "activations kept, bfloat16" not in texts  # nothing there to compare with dense
    assert texts.count("torch.dense") == 1
    assert {"torch.dense, fp32", "torch.dense, bf16"} <= set(texts)


def bench(capsys, *args):
    code = llmkern_cli.main(["bench", *args])
    return code, *capsys.readouterr()


def test_the_command_writes_json_and_plot(capsys, tmp_path):
    out = tmp_path / "out"
    command = ("int8_linear", "--shapes", "32x64", "--m", "1,4", "--dtype", "bf16", "--seconds", "0", "--out", str(out))
    code, text, err = bench(capsys, *command, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert set(found) == {"machine", "limits", "rows", "goals"}
    assert {(row["op"], row["m"]) for row in found["rows"] if row["kernel"]} == {("int8_linear", 1), ("int8_linear", 4)}
    assert json.loads((out / "bench.json").read_text())["rows"] == found["rows"]
    assert ElementTree.parse(out / "bench.svg").getroot().tag.endswith("svg")
    code, text, _ = bench(capsys, *command)
    assert code == 0
    assert "int8_linear" in text
    assert "torch.dense" in text


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("nonsense",), "unknown op nonsense"),
        (("--shapes", "3x"), "wanted NxK"),
        (("--m", "1,0"), "at least 1"),
        (("--dtype", "int3"), "wanted fp32, bf16, fp16"),
        (("--model", "llama-1b", "--recipes", "gptq-int5"), "recipe"),
    ],
)
def test_bad_usage(capsys, args, part):
    code, out, err = bench(capsys, *args)
    assert (code, out) == (2, "")
    assert part in err.splitlines()[-1]


def test_a_model_is_timed_dense_and_packed(capsys, monkeypatch):
    pytest.importorskip("transformers")
    small = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    monkeypatch.setattr(generate, "LLAMA_1B", {**small, **heads, "bos_token_id": None, "eos_token_id": None})
    command = ("--model", "llama-1b", "--recipes", "rtn-int8", "--dtype", "fp32", "--prompt", "8", "--tokens", "4")
    code, text, err = bench(capsys, *command, "--json")
    assert code == 0, err
    rows = json.loads(text)["rows"]
    assert [row["recipe"] for row in rows] == ["dense", "rtn-int8"]
    assert all(row["prefill_tokens_per_s"] > 0 for row in rows)
    assert rows[1]["bytes"] < rows[0]["bytes"]
    assert "rtn-int8" in bench(capsys, *command)[1]


def test_results_say_where_they_were_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    found = json.loads(results.write("some", {"rows": []}).read_text())
    assert found["machine"]["torch"] == torch.__version__
