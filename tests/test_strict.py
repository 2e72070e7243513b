"""What goes wrong is in the report, under the layer it went wrong in, and strict=True makes it an error."""

import json
import math

import pytest
import tiny
import torch

import llmkern
from llmkern import layer_solver
from llmkern.nn import PackedLinear
from llmkern.report import Report, Row
from llmkern.solvers import Hessian, Problem, gptq, hessian, rtn, sparsegpt
from llmkern.solvers.grid import find_grid

METHODS = (
    "gptq-int4", "gptq-int3", "gptq-int8-asym", "wanda-0.5", "wanda-2:4", "sparsegpt-0.5", "sparsegpt-2:4",
    "sparsegpt-2:4-int4", "magnitude-0.5-int8", "rtn-int4", "gptq-w8a8",
)  # fmt: skip


def compress(model, recipe, calibration, **fields):
    return llmkern.compress(model, recipe, calibration, progress=False, **fields)


def packed_names(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_dead(k=32):
    x = normal(100, k)
    x[:, [3, 5]] = 0
    return x


def half_layer():
    """Row 1, columns 16 to 31: int4 scales below what fp16 holds."""
    weight = normal(8, 32) * 0.1
    weight[1, 16:] *= 1e-9
    return weight


CASES = {
    "dead": (with_dead(), {}, "2 of 32 input features are 0 in every token"),
    "fp64": (normal(100, 32), {}, "factored in fp64"),
    "damped": (normal(4, 32), {"damp": 0.0}, "damp raised to"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["gptq-int4-g16", "sparsegpt-0.5", "sparsegpt-2:4-int4-g16"])
def test_problems_of_the_data_are_named_and_strict_refuses_them(case, method, monkeypatch):
    x, changes, text = CASES[case]
    if case == "fp64":  # where fp32 gives up depends on how a machine adds
        factor = hessian._upper_factor
        in_fp64 = lambda matrix: None if matrix.dtype == torch.float32 else factor(matrix)  # noqa: E731
        monkeypatch.setattr(hessian, "_upper_factor", in_fp64)
    recipe = llmkern.Recipe.parse(method, **changes)
    model = tiny.mlp()
    report = compress(model, recipe, [x])
    assert any(text in problem for problem in report.problems["0"])
    assert not any(text in note for note in report.rows[0].notes)
    strict = tiny.mlp()
    with pytest.raises(ValueError, match=rf"layer 0: .*{text}.* \(strict\)"):
        compress(strict, recipe, [x], strict=True)
    assert packed_names(strict) == set()
    assert torch.equal(strict[0].weight, tiny.mlp()[0].weight)


@pytest.mark.parametrize("method", METHODS)
def test_strict_lets_facts_pass(method):
    """3 bits in int4 codes, a mask that no sparse format holds, layers outside blocks: that is how it is."""
    report = compress(tiny.mlp(), method, [normal(100, 32)], strict=True)
    assert report.problems == {}
    assert report.totals["problems"] == 0


def test_a_problem_of_the_second_order_only_is_named_too():
    """SparseGPT with codes factors twice; what the second factor took was not told before."""
    hessian = Hessian(32).add(normal(100, 32))
    first = hessian.factor(None, 0.01)
    told = Problem("told by the second factor")
    hessian._factors["activation", 0.01] = type(first)(**{**vars(hessian.factor("activation", 0.01)), "notes": (told,)})
    assert told in sparsegpt(normal(8, 32), hessian, sparsity="2:4", bits=4, group_size=16).notes


@pytest.mark.parametrize("act_order", ["static", None, "dynamic"])
def test_a_collapsed_scale_is_a_problem(act_order):
    hessian = Hessian(32).add(normal(100, 32))
    solution = gptq(half_layer(), hessian, group_size=16, act_order=act_order, scale_dtype=torch.float16)
    assert [note for note in solution.notes if isinstance(note, Problem)] == [
        "1 of 16 groups collapsed: their scale is below the range of float16"
    ]
    assert gptq(half_layer(), hessian, group_size=16, act_order=act_order).notes == ()
    assert rtn(half_layer(), group_size=16, scale_dtype=torch.float16).notes[0].startswith("1 of 16 groups collapsed")


def test_collapsed_is_what_loses_an_eighth():
    """Against a look at every group: the scale before and after it is stored."""
    weight = normal(64, 256) * torch.logspace(-9, 0, 64)[:, None]
    fields = {"bits": 4, "group_size": 32, "symmetric": True, "clip": None}
    grid = find_grid(weight, None, **fields, scale_dtype=torch.float16)
    exact = find_grid(weight, None, **fields).scales
    wanted = (exact.half().float() / exact - 1).abs() > 1 / 8
    assert torch.equal(grid.collapsed, wanted)
    assert 0 < int(wanted.sum()) < wanted.numel()


def test_groups_of_zeros_are_a_fact():
    weight = normal(8, 40)
    weight[2, 16:32] = 0
    weight[5, 32:] = 0
    hessian = Hessian(40).add(normal(100, 40))
    for solution in (rtn(weight, hessian, group_size=16), gptq(weight, hessian, group_size=16)):
        assert solution.notes == ("2 of 24 groups hold only zeros",)
        assert not isinstance(solution.notes[0], Problem)


@pytest.mark.parametrize("method", METHODS)
def test_one_token(method):
    model = tiny.llama()
    report = compress(model, llmkern.Recipe.parse(method, ignore=()), tiny.token_ids(1, 1))
    assert {row.tokens for row in report.rows} <= {0, 1}
    assert torch.isfinite(tiny.output("llama", model, tiny.token_ids(2))).all()
    assert all(math.isfinite(row.loss) for row in report.rows)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (5, 1), (3, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_one_row_or_column(method, n, k):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(k, n), torch.nn.Linear(n, 2))
    report = compress(model, method, [normal(20, k)])
    assert packed_names(model) == {"0", "1"}
    assert torch.isfinite(model(normal(3, k))).all()
    assert all(math.isfinite(row.loss) for row in report.rows)


@pytest.mark.parametrize("method", METHODS)
def test_all_zero_weights(method):
    model = tiny.mlp()
    torch.nn.init.zeros_(model[0].weight)
    report = compress(model, method, [normal(40, 32)])
    assert report.rows[0].loss == 0
    assert not model[0].unpack().any()
    assert "0" not in report.problems


class Twice(torch.nn.Module):
    """One module under two names, and called under both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(16, 16)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_module_of_two_names_is_compressed_once_on_both_inputs(tmp_path):
    model = Twice()
    report = compress(model, "gptq-int8", [normal(20, 16)], state_dir=tmp_path)
    assert [row.name for row in report.rows] == ["first"]
    assert report.rows[0].tokens == 40
    assert isinstance(model.first, PackedLinear)
    assert model.second is model.first
    again = Twice()
    compress(again, "gptq-int8", [normal(20, 16)], state_dir=tmp_path)
    assert again.second is again.first
    assert torch.equal(again.first.codes, model.first.codes)


class Across(torch.nn.Module):
    """One module in two blocks of a chain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16)) for _ in range(3)
        )
        self.blocks[2][0] = self.blocks[0][0]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_module_of_two_blocks_is_compressed_once_on_both_inputs(monkeypatch):
    seen = {}
    keep = layer_solver.solve_and_keep

    def record(caller, name, layer, hessian, *rest):
        seen[name] = hessian.raw().clone()
        return keep(caller, name, layer, hessian, *rest)

    monkeypatch.setattr(layer_solver, "solve_and_keep", record)
    model, x = Across(), normal(20, 16)
    report = compress(model, llmkern.Recipe.parse("gptq-int8", objective="layer"), [x])
    assert model.blocks[2][0] is model.blocks[0][0]
    assert isinstance(model.blocks[0][0], PackedLinear)
    assert sorted(row.name for row in report.rows) == [f"blocks.{at}" for at in ("0.0", "0.2", "1.0", "1.2", "2.2")]
    assert "it stands in several blocks" in report.rows[-1].notes[0]
    assert report.rows[-1].tokens == 40
    twin = Across()  # the shared layer is dense while everything else is compressed
    for at, child in (("0.2", 2), ("1.0", 0), ("1.2", 2), ("2.2", 2)):
        twin.blocks[int(at[0])][child] = model.blocks[int(at[0])][child]
    inner = twin.blocks[:2]
    hidden = inner[1](inner[0](x)).detach()
    torch.testing.assert_close(seen["blocks.0.0"], x.T @ x + hidden.T @ hidden, rtol=1e-4, atol=1e-3)


def test_strict_refuses_what_a_state_holds(tmp_path):
    compress(tiny.mlp(), "gptq-int4", [with_dead()], state_dir=tmp_path)
    with pytest.raises(ValueError, match="layer 0: 2 of 32 input features"):
        compress(tiny.mlp(), "gptq-int4", [with_dead()], state_dir=tmp_path, strict=True)


def test_the_report_shows_problems_everywhere():
    rows = [
        Row(f"layers.{at}", (64, 32), "gptq-int4", "reference", 0.01, 0.5, 8192, 1280, problems=("<dead>",))
        for at in range(3)
    ]
    report = Report("gptq-int4", [*rows, Row("fine", (64, 32), "gptq-int4", "reference", 0.01, 0.5, 8192, 1280)])
    assert report.problems == {f"layers.{at}": ("<dead>",) for at in range(3)}
    assert "problem: layers.0 and 2 more layers: <dead>" in str(report)
    html = report.to_html()
    assert "<h2>Problems</h2>" in html
    assert html.count("&lt;dead&gt;") == 6  # in the list and in the table of layers
    data = json.loads(report.to_json())
    assert data["totals"]["problems"] == 3
    assert data["rows"][0]["problems"] == ["<dead>"]
    assert "<h2>Problems</h2>" not in Report("bf16").to_html()


def test_many_problems_are_counted_and_not_listed():
    rows = [Row(str(at), (1, 1), "", "", 0.0, 0, 0, 0, problems=(f"p{at}",)) for at in range(12)]
    assert Report("x", rows).problem_lines()[-1] == "... and 2 more problems"
