"""Several ranks give what one gives; what goes wrong on one of them ends all, in time and with its name."""

import pytest
import torch
from ranks import values
from scripts import said_by

from llmkern.distributed import share_out
from llmkern.layer_solver import NO_SHIFT
from llmkern.solvers import Hessian

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
GONE = "compress: rank 0 of 2: another rank has ended or hangs: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(folder):
    """Scenario -> what each rank said; see ranks.py."""
    return said_by("ranks.py", folder)


def assert_nearly_one_run(ranks, one):
    """All ranks hold the same model and report, which is that of one process but for the order of summation."""
    (one,) = (rank["value"] for rank in one)
    for rank in ranks:
        assert rank["digest"] == ranks[0]["digest"]
        assert rank["rows"] == ranks[0]["rows"]
        assert rank["tokens"] == one["tokens"]
    rows = {row["name"]: row for row in one["rows"]}
    assert len(rows) == len(ranks[0]["rows"])
    for row in ranks[0]["rows"]:
        assert row["loss"] == pytest.approx(rows[row["name"]]["loss"], rel=1e-3)
        assert row["tokens"] == rows[row["name"]]["tokens"]


def test_two_ranks_give_what_one_gives(runs, folder):
    assert_nearly_one_run(values(runs["two"]), runs["one"])
    one, two = (safetensors.load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Scales are least squares of sums that round in another order.
        same = tensor == two[name] if not tensor.is_floating_point() else torch.isclose(tensor, two[name], rtol=1e-3)
        assert same.float().mean() > 0.99, name


def test_layers_are_solved_side_by_side(runs):
    for name in ("two", "experts", "data_free"):
        first, second = (rank["solved"] for rank in values(runs[name]))
        assert first
        assert second
        assert sorted(first + second) == sorted(row["name"] for row in runs[name][0]["value"]["rows"])


def test_experts_that_a_rank_never_ran(runs):
    assert_nearly_one_run(values(runs["experts"]), runs["one_experts"])
    for rank in runs["experts"]:
        solved = rank["value"]["solved"]
        assert ("blocks.0.a1" in solved) == ("blocks.0.a2" in solved)
        assert ("blocks.0.b1" in solved) == ("blocks.0.b2" in solved)


@pytest.mark.parametrize("kind", ["mixtral", "switch"])
def test_mixtures_give_what_one_rank_gives(runs, kind):
    """switch: experts in a dict, calibrated from all tokens, on three ranks for two batches."""
    assert_nearly_one_run(values(runs[kind]), runs[f"one_{kind}"])


def test_inputs_are_corrected_as_on_one_rank(runs):
    ranks = values(runs["corrected"])
    assert_nearly_one_run(ranks, runs["one_corrected"])
    noted = {row["name"] for row in ranks[0]["rows"] if NO_SHIFT in row["notes"]}
    assert noted == {"lm_head"}


def test_a_rank_without_batches_takes_part(runs):
    ranks = values(runs["idle"])
    assert {rank["digest"] for rank in ranks} == {ranks[0]["digest"]}
    assert ranks[0]["tokens"] == ranks[0]["rows"][0]["tokens"] == 264
    assert ranks[2]["solved"]


def test_data_free_recipes_are_shared_out(runs):
    assert_nearly_one_run(values(runs["data_free"]), runs["one_data_free"])


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ("unreached", "layer blocks.0.b1 saw no calibration tokens"),
        ("infinite_weight", "layer model.layers.1.mlp.down_proj (gptq-int4-g32): gptq: weights hold a NaN"),
        ("infinite_batch", "the input of layer 0: Hessian.add: x has non-finite values"),
        ("different", "ranks must be given the same: recipe.bits is 4 on rank 0 and 8 on rank 1"),
        ("foreign", "of another run: recipe.bits is 4 there and 8 here"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(runs, run, text):
    for rank in runs[run]:
        assert rank["code"] == 0  # it ended by itself
        assert rank["error"].startswith("ValueError: ")
        assert text in rank["error"]


def test_a_killed_rank_ends_the_run_and_it_can_be_resumed(runs, folder):
    first, second = runs["killed"]
    assert second["code"] == -9
    assert first["error"].startswith(f"RuntimeError: {GONE}")
    assert "1 finished parts are kept in" in first["error"]
    assert first["seconds"] < 60  # not the timeout's 120: the connection tells
    resumed = values(runs["resumed"])
    assert [rank["digest"] for rank in resumed] == [rank["value"]["digest"] for rank in runs["two"]]
    assert resumed[0]["rows"] == runs["two"][0]["value"]["rows"]
    assert not any(name.startswith("model.layers.0.") for rank in resumed for name in rank["solved"])
    resumed, two = ((folder / name / "model.safetensors").read_bytes() for name in ("resumed", "two"))
    assert resumed == two


def test_a_rank_that_hangs_is_given_up(runs):
    assert runs["hangs"][0]["error"].startswith(f"RuntimeError: {GONE}Timed out")


def layers(*shapes):
    return {str(at): shape for at, shape in enumerate(shapes)}


def test_owners_are_balanced():
    """q is as dear as k, v and a second factor; gate and up part; a lone layer stays with the first rank."""
    assert share_out([layers((64, 64), (16, 64), (16, 64))], 2) == [{"0": 0, "1": 1, "2": 1}]
    assert share_out([layers((96, 64), (96, 64))], 2) == [{"0": 0, "1": 1}]
    assert share_out([layers((64, 96))], 3) == [{"0": 0}]
    assert share_out([layers((1, 64), (1, 64))], 2) == [{"0": 0, "1": 0}]  # a second factor would hardly save anything
    assert share_out([layers((8, 8), (8, 8), (16, 8))], 2, factor=False) == [{"0": 1, "1": 1, "2": 0}]
    experts = [layers((32, 16), (32, 16)) for _ in range(8)]
    owners = share_out(experts, 4)
    assert all(len(set(of.values())) == 1 for of in owners)  # experts are enough to go round without a second factor
    assert sorted(of["0"] for of in owners) == sorted([0, 1, 2, 3] * 2)


def test_partial_sums_add_up():
    x = torch.randn(90, 300, generator=torch.Generator().manual_seed(0))
    parts = [Hessian(300).add(part) for part in x.split(40)]
    total = Hessian.from_partial(sum(part.partial() for part in parts), 90)
    torch.testing.assert_close(total.matrix(), Hessian(300).add(x).matrix())
    assert torch.equal(total.raw(), total.raw().T)
    assert parts[0].tokens == 40  # and is as it was
    bad = parts[0].partial()
    bad[3, 3] = float("nan")
    with pytest.raises(ValueError, match="feature 3"):
        Hessian.from_partial(bad, 40).raw()
