"""Several ranks that stream one model give what they give when each holds it whole, one block in memory at a time."""

import pytest
import streamed_ranks
from ranks import values
from scripts import said_by

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SCENARIOS = streamed_ranks.scenarios()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(folder):
    """Scenario -> what each rank said; see streamed_ranks.py."""
    return said_by("streamed_ranks.py", folder)


def assert_same(first, second):
    """The same model and report on all ranks of both runs."""
    for rank in (*first, *second):
        assert rank["rows"] == first[0]["rows"]
        assert rank["digest"] == first[0]["digest"]


@pytest.mark.parametrize("scenario", [*SCENARIOS, "irregular"])
def test_streamed_it_is_the_same_model(runs, scenario):
    whole, streamed = values(runs[f"{scenario}-whole"]), values(runs[f"{scenario}-stream"])
    assert_same(whole, streamed)
    assert [rank["solved"] for rank in streamed] == [rank["solved"] for rank in whole]
    assert all(rank["solved"] for rank in streamed)
    notes = streamed[0]["notes"]
    assert "calibrated and solved on 2 ranks" in notes
    assert not any("what the model's output feels" in note for note in notes)


@pytest.mark.parametrize("scenario", [*SCENARIOS, "irregular"])
def test_a_rank_has_one_block_in_memory(runs, scenario):
    """Experts that stay dense stay in memory with their block."""
    stay = scenario.startswith(("stay-m", "stay-g"))
    assert [rank["most"] for rank in values(runs[f"{scenario}-stream"])] == [2 if stay else 1] * 2


def test_dense_values_are_kept_where_they_run(runs):
    """Outside of chains and without data all that a rank owns is solved before any of it is put in place."""
    for scenario, share in (("llama-gptq-int4-g16-layer", 1), ("irregular", 0), ("llama-rtn-int4-g16-None", 0)):
        for rank in values(runs[f"{scenario}-stream"]):
            assert rank["dense"] == share * len(rank["solved"])


def test_a_rank_reads_the_blocks_that_it_solves(runs, folder):
    """Four blocks without biases: two for each rank, and nothing else."""
    matrices = sum(
        tensor.nbytes
        for path in (folder / "llama").glob("*.safetensors")
        for name, tensor in safetensors.load_file(path).items()
        if ".layers." in name
    )
    assert [rank["read"] for rank in values(runs["llama-rtn-int4-g16-None-stream"])] == [matrices // 2] * 2


def test_one_rank_may_stream_while_the_other_does_not(runs):
    assert_same(values(runs["llama-gptq-int4-g16-model-whole"]), values(runs["mixed"]))


def test_a_killed_streamed_run_is_resumed(runs):
    first, second = runs["killed"]
    assert second["code"] == -9
    assert "another rank has ended or hangs" in first["error"]
    assert "2 finished parts are kept in" in first["error"]
    unbroken, resumed = values(runs["unbroken"]), values(runs["resumed"])
    assert_same(unbroken, resumed)
    solved = [name for rank in resumed for name in rank["solved"]]
    assert solved
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in solved)
    again = values(runs["again"])
    assert_same(unbroken, again)
    assert [rank["solved"] for rank in again] == [[], []]


def test_parts_without_data_are_durable_as_they_are_solved(runs):
    first, second = runs["killed_rtn"]
    assert first["code"] == -9
    assert "another rank has ended or hangs" in second["error"]
    resumed = values(runs["resumed_rtn"])
    assert_same(values(runs["unbroken_rtn"]), resumed)
    solved = [name for rank in resumed for name in rank["solved"]]
    assert solved
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in solved)


@pytest.mark.parametrize("run", ["cut", "cut_later", "cut_rtn", "cut_state"])
def test_what_one_rank_cannot_read_ends_all(runs, run):
    """Before the first block, at the last, without data, and while the values are compared with a state's."""
    for rank in runs[run]:
        assert rank["code"] == 0
        assert rank["error"].startswith("ValueError: stream: ")
        assert "the file ends inside tensor" in rank["error"]
    first, second = runs[run]
    assert "(rank 1)" in first["error"]
    assert "(rank 1)" not in second["error"]
    if run == "cut_later":
        assert "21 of 28 layers are changed already" in first["error"]
