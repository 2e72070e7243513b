"""Solvers against the published algorithms in float64, their promises (loss, purity, packing), and their errors."""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import reference_solvers as published
from llmkern.formats import BitmaskWeight, Int4Weight, Int8Weight, Sparse24Int4Weight, Sparse24Weight
from llmkern.solvers import GPTQ, Hessian, Quantizer, SparseGPT, gptq, magnitude, rtn, sparsegpt, wanda

N, K = 24, 200  # one whole block of 128 columns and a short one; groups of 64 leave a short one too


def inputs(k=K, tokens=1500, seed=0):
    """Correlated activations [tokens, k] with channels of different energy."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=generator) / k**0.5
    return torch.randn(tokens, k, generator=generator) @ mix * (0.2 + torch.rand(k, generator=generator))


def layer_problem(n=N, k=K, seed=0):
    x = inputs(k, seed=seed)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed + 1)) * 0.05
    return weight, x.T @ x / len(x)


def exact_loss(weight, solved, h):
    weight, difference, h = weight.double(), (weight - solved).double(), h.double()
    return float(((difference @ h) * difference).sum() / ((weight @ h) * weight).sum())


def assert_same_rows(ours, theirs):
    """Rows agree but for one in ten.

    A group's largest weight lies exactly between two symmetric codes (max / scale = 2^(bits-1) - 1/2), so where no
    feedback has reached it yet, the last bit of the arithmetic decides, and the rest of its row follows.
    """
    agree = torch.isclose(ours, theirs.float(), rtol=1e-5, atol=1e-6).all(1)
    assert agree.float().mean() >= 0.9


@pytest.mark.parametrize("solve", [gptq, partial(sparsegpt, bits=4), partial(sparsegpt, refit=False)])
def test_no_loss(solve, monkeypatch):
    """Nothing else changes, and none of its products is made."""
    weight, h = layer_problem()
    with_loss = solve(weight, h)
    for module in ("gptq", "sparsegpt"):
        monkeypatch.setattr(sys.modules[f"llmkern.solvers.{module}"], "relative_loss", None)
    without = solve(weight, h, loss=False)
    assert math.isnan(without.loss)
    assert torch.equal(without.weight, with_loss.weight)
    assert without.notes == with_loss.notes


class TestAgainstPublished:
    """The same weights as chol + inverse + chol and a loop per column, in float64."""

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize(
        ("act_order", "group_size"), [("dynamic", 64), ("dynamic", 48), ("dynamic", None), ("static", 64), (None, None)]
    )
    def test_gptq(self, act_order, group_size, bits, symmetric):
        weight, h = layer_problem()
        ours = gptq(weight, h, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order, clip=None)
        theirs = published.gptq(
            weight.double(), h.double(), bits=bits, group_size=group_size, symmetric=symmetric,
            act_order=act_order == "static", static_groups=act_order == "static",
        )  # fmt: skip
        assert_same_rows(ours.weight, theirs.weight)
        assert ours.loss == pytest.approx(exact_loss(weight, theirs.weight, h), rel=0.02)

    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97, "2:4", "1:4", "4:8"])
    def test_sparsegpt(self, sparsity):
        weight, h = layer_problem()
        ours = sparsegpt(weight, h, sparsity=sparsity, refit=False)
        n, m = map(int, sparsity.split(":")) if isinstance(sparsity, str) else (0, 0)
        fraction = 0.0 if m else sparsity
        theirs = published.sparsegpt(weight.double(), h.double(), sparsity=fraction, prune_n=n, prune_m=m)
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(ours.weight, theirs.weight.float(), rtol=1e-4, atol=1e-6)

    def test_single_pass_joint(self):
        weight, h = layer_problem()
        ours = sparsegpt(weight, h, sparsity="2:4", bits=4, group_size=None, refit=False, clip=None)
        theirs = published.sparsegpt(weight.double(), h.double(), prune_n=2, prune_m=4, bits=4)
        assert_same_rows(ours.weight, theirs.weight)

    def test_dead_columns(self):
        x = inputs()
        x[:, [3, 130, 199]] = 0
        weight, h = layer_problem()[0], x.T @ x / len(x)
        ours = gptq(weight, h, group_size=64, act_order=None, clip=None)
        assert not ours.weight[:, [3, 130, 199]].any()
        assert "3 of 200 input features are 0" in ours.notes[0]
        assert ours.loss == pytest.approx(exact_loss(weight, ours.weight, h), rel=1e-3)
        alive = [j for j in range(K) if j not in (3, 130, 199)]
        pruned = sparsegpt(weight, h, sparsity=0.0, refit=False)
        assert not pruned.weight[:, [3, 130, 199]].any()
        assert torch.equal(pruned.weight[:, alive], weight[:, alive])


def test_hessian_of_any_scale():
    weight, h = layer_problem()
    whole = gptq(weight, h, group_size=64)
    scaled = gptq(weight, h * 2**20, group_size=64)
    assert torch.equal(whole.weight, scaled.weight)
    assert whole.loss == pytest.approx(scaled.loss, rel=1e-5)


@pytest.mark.parametrize(
    "solve",
    [
        lambda w, h: rtn(w, h, bits=4, group_size=64),
        lambda w, h: magnitude(w, h, sparsity=0.5),
        lambda w, h: wanda(w, h, sparsity="2:4"),
        lambda w, h: gptq(w, h, bits=4, group_size=64),
        lambda w, h: gptq(w, h, bits=8, group_size=None, symmetric=False),
        lambda w, h: gptq(w, h, bits=3, group_size=64, act_order="dynamic", descent=2),
        lambda w, h: sparsegpt(w, h, sparsity=0.5),
        lambda w, h: sparsegpt(w, h, sparsity="2:4", bits=4, group_size=64),
        lambda w, h: sparsegpt(w, h, sparsity=0.6, bits=8, group_size=None),
        lambda w, h: sparsegpt(w, h, sparsity=0.6, bits=4, group_size=64, refit=False),
    ],
)
def test_promises(solve):
    """Inputs unchanged, loss is the formula's, packed holds the weight, mask holds its zeros."""
    weight, h = layer_problem()
    before = weight.clone(), h.clone()
    solution = solve(weight, h)
    assert torch.equal(weight, before[0])
    assert torch.equal(h, before[1])
    assert solution.loss == pytest.approx(exact_loss(weight, solution.weight, h), rel=2e-3)
    assert torch.equal(solution.packed.unpack(), solution.weight)
    if solution.mask is not None:
        assert not solution.weight[~solution.mask].any()


def test_loss_of_an_undetermined_problem():
    """Fewer tokens than features: nearly all of the damped energy is damping, and the loss must not be its rounding."""
    weight, x = layer_problem()[0], inputs(tokens=16)
    solution = gptq(weight, Hessian(K).add(x), group_size=64, damp=0.5)
    assert solution.loss == pytest.approx(exact_loss(weight, solution.weight, x.T @ x), rel=1e-2)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bits": 2}, Int4Weight),
        ({"bits": 3}, Int4Weight),
        ({"bits": 4}, Int4Weight),
        ({"bits": 5}, Int8Weight),
        ({"bits": 8, "group_size": None}, Int8Weight),
    ],
)
def test_quantized_kinds(options, kind):
    weight, h = layer_problem()
    solution = gptq(weight, h, **({"group_size": 64} | options))
    assert type(solution.packed) is kind
    assert (solution.notes == ()) == (options["bits"] in (4, 8))
    low = -(2 ** (options["bits"] - 1))
    codes = solution.packed.codes() if kind is Int4Weight else solution.packed.codes
    assert int(codes.min()) >= low
    assert int(codes.max()) <= -low - 1


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"sparsity": 0.5}, BitmaskWeight),
        ({"sparsity": "4:8"}, BitmaskWeight),
        ({"sparsity": "2:4"}, Sparse24Weight),
        ({"sparsity": "3:4"}, Sparse24Weight),
        ({"sparsity": "2:4", "bits": 4}, Sparse24Int4Weight),
        ({"sparsity": "2:4", "bits": 8}, Sparse24Weight),
        ({"sparsity": 0.5, "bits": 8}, BitmaskWeight),
        ({"sparsity": 0.5, "bits": 4}, Int4Weight),
    ],
)
def test_sparse_kinds(options, kind):
    weight, h = layer_problem()
    solution = sparsegpt(weight, h, group_size=64, **options)
    assert type(solution.packed) is kind
    assert torch.equal(solution.packed.unpack(), solution.weight)


def test_pruned_weights_keep_their_dtype():
    weight, h = layer_problem()
    solution = sparsegpt(weight.bfloat16(), h, sparsity="2:4")
    assert solution.packed.values.dtype == torch.bfloat16
    assert torch.equal(solution.packed.unpack(), solution.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_chosen_on_stored_scales(dtype):
    ratios = []
    for seed in range(16):  # of one layer, chance decides
        weight, h = layer_problem(seed=seed)
        solution = gptq(weight, h, bits=8, group_size=64, scale_dtype=dtype)
        assert solution.packed.scales.dtype == dtype
        assert torch.equal(solution.packed.unpack(), solution.weight)
        afterwards = gptq(weight, h, bits=8, group_size=64).packed
        cast = Int8Weight.from_tensors(
            {"codes": afterwards.codes, "scales": afterwards.scales.to(dtype)}, shape=(N, K), group_size=64
        )
        ratios.append(solution.loss / exact_loss(weight, cast.unpack(), h))
    # bfloat16 has 8 bits as the codes have; float16 has 11.
    assert sum(ratios) / 16 < (0.95 if dtype == torch.bfloat16 else 1.01)


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(3)
    x = inputs(256, seed=5)
    x[:, :4] *= 8  # outlier channels, as language models have
    weight = torch.randn(64, 256, generator=generator) * torch.rand(64, 256, generator=generator).pow(2)
    return weight, x.T @ x / len(x)


class TestImprovements:
    """What the options add over the published algorithms, on correlated inputs; each must lower the loss."""

    def test_gptq(self, problem):
        rounded = rtn(*problem, bits=3, group_size=64).loss
        paper = gptq(*problem, bits=3, group_size=64, act_order="dynamic", clip=None).loss
        ordered = gptq(*problem, bits=3, group_size=64, clip=None).loss
        clipped = gptq(*problem, bits=3, group_size=64, clip="hessian").loss
        descended = gptq(*problem, bits=3, group_size=64, clip="hessian", descent=3).loss
        assert rounded > paper > ordered > clipped > descended

    def test_sparsegpt(self, problem):
        pruned = magnitude(*problem, sparsity="2:4").loss
        scored = wanda(*problem, sparsity="2:4").loss
        paper = sparsegpt(*problem, sparsity="2:4", refit=False).loss
        refitted = sparsegpt(*problem, sparsity="2:4").loss
        assert pruned > scored > paper > refitted

    def test_joint(self, problem):
        options = {"sparsity": "2:4", "bits": 4, "group_size": 64}
        paper = sparsegpt(*problem, refit=False, clip=None, **options).loss
        one_pass = sparsegpt(*problem, descent=0, **options).loss
        descended = sparsegpt(*problem, **options).loss
        assert paper > one_pass > descended

    def test_refit_is_the_least_squares_solution(self, problem):
        weight, h = (tensor.double() for tensor in problem)
        solution = sparsegpt(*problem, sparsity=0.5)
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
        keep = solution.mask[0]
        exact = torch.linalg.solve(damped[keep][:, keep], damped[keep] @ weight[0])
        found = solution.weight[0, keep].double() - exact
        left = sparsegpt(*problem, sparsity=0.5, refit=False).weight[0, keep].double() - exact
        inner = damped[keep][:, keep]
        assert found @ inner @ found < 1e-3 * (left @ inner @ left)

    def test_descent_never_raises_the_damped_objective(self, problem):
        weight, h = problem
        damped = h.double() + 0.01 * h.diagonal().mean() * torch.eye(len(h))
        losses = []
        for passes in range(4):
            error = (weight - gptq(weight, h, bits=2, group_size=32, descent=passes).weight).double()
            losses.append(float(((error @ damped) * error).sum()))
        assert losses == sorted(losses, reverse=True)
        assert losses[1] < losses[0]


def test_mask_is_kept():
    weight, h = layer_problem()
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 0.5
    for options in ({}, {"descent": 2}, {"symmetric": False}, {"act_order": None}):
        solution = gptq(weight, h, group_size=64, mask=mask, **options)
        assert not solution.weight[~mask].any()
        assert torch.equal(solution.mask, mask)
        assert torch.equal(solution.packed.unpack(), solution.weight)


@pytest.mark.parametrize("sparsity", [0.0, 1 / 3, 0.5, 0.99])
def test_share_is_exact(sparsity):
    weight, h = layer_problem()
    for solution in (sparsegpt(weight, h, sparsity=sparsity), magnitude(weight, sparsity=sparsity)):
        assert int((~solution.mask).sum()) == round(sparsity * N * K)
    assert ((~wanda(weight, h, sparsity=sparsity).mask).sum(1) == round(sparsity * K)).all()


def test_ties_prune_no_more():
    weight, h = torch.ones(8, 12), torch.eye(12)
    for solution in (magnitude(weight, sparsity=0.5), sparsegpt(weight, h, sparsity=0.5), wanda(weight, h)):
        assert int(solution.mask.sum()) == 48


@pytest.mark.parametrize("solve", [sparsegpt, magnitude, wanda])
def test_short_last_group(solve):
    """K = 11 with 2:4: the last three columns keep two."""
    weight, h = layer_problem(k=11)
    mask = solve(weight, h, sparsity="2:4").mask
    assert (mask[:, :8].view(N, 2, 4).sum(-1) == 2).all()
    assert (mask[:, 8:].sum(-1) == 2).all()


class TestHessian:
    def test_is_the_second_moment(self):
        x = inputs(300, 64)
        hessian = Hessian(300).add(x[:10].view(2, 5, 300)).add(x[10:])
        assert hessian.tokens == 64
        torch.testing.assert_close(hessian.matrix(), x.T @ x / 64)

    def test_merge(self):
        x = inputs(300, 64)
        merged = Hessian(300).add(x[:30]).merge(Hessian(300).add(x[30:]))
        assert merged.tokens == 64
        torch.testing.assert_close(merged.matrix(), x.T @ x / 64)

    def test_low_precision_inputs_are_summed_in_fp32(self):
        x = inputs(32, 64).bfloat16()
        torch.testing.assert_close(Hessian(32).add(x).matrix(), x.float().T @ x.float() / 64)

    @pytest.mark.parametrize("order", [None, "activation"])
    def test_factor(self, order):
        hessian = Hessian(96).add(inputs(96))
        factor = hessian.factor(order, 0.01)
        upper = factor.unit * factor.diagonal
        places = torch.arange(96) if factor.order is None else factor.order
        torch.testing.assert_close(upper @ upper.T, hessian.damped(0.01)[places][:, places], rtol=1e-4, atol=1e-2)
        assert torch.equal(factor.unit.triu(), factor.unit)
        assert hessian.factor(order, 0.01) is factor
        assert hessian.add(inputs(96)).factor(order, 0.01) is not factor

    def test_ill_conditioned_is_reported(self):
        vector = torch.linspace(1, 2, 64)
        nearly_singular = torch.outer(vector, vector) + 1e-8 * torch.eye(64)
        factor = Hessian.from_matrix(nearly_singular).factor(None, 1e-10)
        assert factor.notes
        upper = (factor.unit * factor.diagonal).double()
        torch.testing.assert_close(
            upper @ upper.T, Hessian.from_matrix(nearly_singular).damped(factor.damp).double(), rtol=1e-4, atol=1e-6
        )

    def test_raised_damping_reaches_the_solution(self):
        weight, x = layer_problem()[0], inputs(tokens=8)
        solution = gptq(weight, Hessian(K).add(x), group_size=64, damp=0.0)
        assert solution.damp > 0
        assert any("damp raised" in note for note in solution.notes)

    def test_not_positive_definite_at_all(self):
        indefinite = torch.eye(8)
        indefinite[0, 1] = indefinite[1, 0] = 9.0
        with pytest.raises(ValueError, match="not positive definite"):
            gptq(torch.randn(4, 8), indefinite, group_size=8)

    @pytest.mark.parametrize(
        ("call", "text"),
        [
            (lambda: Hessian(0), "K must be"),
            (lambda: Hessian(4).add(torch.ones(2, 5)), r"x must be \[..., K=4\]"),
            (lambda: Hessian(4).add(torch.tensor([[1.0, float("nan"), 1, 1]])), "non-finite values .* in feature 1"),
            (lambda: Hessian(4).merge(Hessian(5)), "K differs"),
            (lambda: Hessian(4).matrix(), "zero calibration tokens"),
            (lambda: Hessian.from_matrix(torch.ones(2, 3)), r"must be \[K, K\]"),
        ],
    )
    def test_errors(self, call, text):
        with pytest.raises(ValueError, match=text):
            call()

    def test_nan_leaves_the_state_alone(self):
        hessian = Hessian(4).add(torch.ones(2, 4))
        with pytest.raises(ValueError, match="non-finite"):
            hessian.add(torch.full((1, 4), float("inf")))
        assert hessian.tokens == 2
        assert torch.equal(hessian.matrix(), torch.ones(4, 4))


W, H = layer_problem(4, 32)


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[1, 1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: gptq(W, with_nan(H), group_size=32), "the matrix holds a NaN"),
        (lambda: gptq(W, H + torch.ones(32, 32).triu(1), group_size=32), "not symmetric"),
        (lambda: gptq(W, torch.eye(31), group_size=32), "Hessian is of K=31"),
        (lambda: sparsegpt(W, Hessian(32)), "zero calibration tokens"),
        (lambda: gptq(with_nan(W), H, group_size=32), "NaN"),
        (lambda: sparsegpt(with_nan(W), H), "NaN"),
        (lambda: magnitude(with_nan(W)), "NaN"),
        (lambda: gptq(W, H, bits=1, group_size=32), "bits must be an int in 2..8, got 1"),
        (lambda: gptq(W, H, bits=16, group_size=32), "bits must be"),
        (lambda: rtn(W, bits=True, group_size=32), "bits must be"),
        (lambda: gptq(W, H, group_size=0), "group_size must be .*, got 0"),
        (lambda: gptq(W, H, group_size=-1), "group_size must be"),
        (lambda: gptq(W, H, group_size=33), "group_size must be"),
        (lambda: gptq(W, H, group_size=True), "group_size must be"),
        (lambda: gptq(W, H, group_size=32, damp=-0.1), "damp must be"),
        (lambda: gptq(W, H, group_size=32, damp=float("nan")), "damp must be"),
        (lambda: gptq(W, H, group_size=32, act_order="yes"), "act_order must be one of 'static'"),
        (lambda: gptq(W, H, group_size=32, clip="max"), "clip must be one of"),
        (lambda: gptq(W, H, group_size=32, descent=-1), "descent must be an int"),
        (lambda: gptq(W, H, group_size=32, mask=torch.ones(4, 31, dtype=torch.bool)), "mask must be"),
        (lambda: rtn(W, group_size=32, clip="hessian"), "needs a Hessian"),
        (lambda: sparsegpt(W, H, sparsity=1.0), r"sparsity must be a number in \[0, 1\)"),
        (lambda: sparsegpt(W, H, sparsity=-0.1), "sparsity must be"),
        (lambda: magnitude(W, sparsity=float("nan")), "sparsity must be"),
        (lambda: sparsegpt(W, H, sparsity=True), "sparsity must be"),
        (lambda: sparsegpt(W, H, sparsity="2:"), "sparsity must be"),
        (lambda: wanda(W, H, sparsity="a:b"), "sparsity must be"),
        (lambda: magnitude(W, sparsity="4:4"), "n:m needs 0 < n < m"),
        (lambda: sparsegpt(W, H, sparsity="2:4", bits=9), "bits must be"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


class Conv1D(nn.Module):
    """As transformers' Conv1D: weight [K, N]."""

    def __init__(self, n, k):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, n) * 0.05)
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return x @ self.weight + self.bias


class TestReferenceAPI:
    def test_the_loop_of_the_reference_scripts(self):
        torch.manual_seed(0)
        layers = {"fc1": nn.Linear(64, 32), "fc2": Conv1D(16, 32)}
        before = copy.deepcopy(layers)
        gpts = {name: SparseGPT(layer) for name, layer in layers.items()}
        hooks = [
            layer.register_forward_hook(lambda _, inp, out, name=name: gpts[name].add_batch(inp[0].data, out.data))
            for name, layer in layers.items()
        ]
        x = inputs(64, 512).view(4, 128, 64)
        layers["fc2"](layers["fc1"](x))
        for hook in hooks:
            hook.remove()
        target_sparsity_ratio = 0.5
        for name in gpts:
            gpts[name].fasterprune(target_sparsity_ratio)
            gpts[name].free()
        for name, layer in layers.items():
            assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5)
            assert layer.weight.shape == before[name].weight.shape
        theirs = published.sparsegpt(
            before["fc1"].weight.detach().double(), Hessian(64).add(x).matrix().double(), sparsity=0.5
        )
        torch.testing.assert_close(layers["fc1"].weight.detach(), theirs.weight.float(), rtol=1e-4, atol=1e-6)

    def test_prunen_is_the_number_pruned(self):
        layer = nn.Linear(64, 8)
        solver = SparseGPT(layer)
        solver.add_batch(inputs(64, 256), None)
        solver.fasterprune(0.0, prunen=1, prunem=4)
        assert ((layer.weight.view(8, -1, 4) == 0).sum(-1) == 1).all()

    @pytest.mark.parametrize(
        ("groupsize", "actorder", "static_groups"),
        [(-1, False, False), (-1, True, False), (32, False, False), (32, True, False), (32, True, True)],
    )
    @pytest.mark.parametrize("sym", [True, False])
    def test_gptq(self, groupsize, actorder, static_groups, sym):
        torch.manual_seed(0)
        layer, x = nn.Linear(K, N), inputs()
        weight = layer.weight.detach().clone()
        solver = GPTQ(layer)
        solver.quantizer = Quantizer()
        solver.quantizer.configure(4, perchannel=True, sym=sym, mse=False)
        solver.add_batch(x, layer(x))
        solver.fasterquant(groupsize=groupsize, actorder=actorder, static_groups=static_groups)
        h = (x.T @ x / len(x)).double()
        theirs = published.gptq(
            weight.double(), h, bits=4, group_size=None if groupsize == -1 else groupsize, symmetric=sym,
            act_order=actorder, static_groups=static_groups,
        )  # fmt: skip
        assert_same_rows(layer.weight.detach(), theirs.weight)
        assert solver.loss == pytest.approx(exact_loss(weight, layer.weight.detach(), h), rel=2e-3)
        assert solver.quantizer.ready()

    def test_joint_with_a_quantizer(self):
        torch.manual_seed(0)
        layer, x = nn.Linear(64, 8), inputs(64)
        weight = layer.weight.detach().double()
        solver = SparseGPT(layer)
        solver.quantizer = Quantizer()
        solver.quantizer.configure(4, perchannel=True, sym=False, mse=False)
        solver.add_batch(x, None)
        solver.fasterprune(0.0, prunen=2, prunem=4)
        theirs = published.sparsegpt(weight, (x.T @ x).double(), prune_n=2, prune_m=4, bits=4, symmetric=False)
        assert_same_rows(layer.weight.detach(), theirs.weight)

    @pytest.mark.parametrize(
        "options", [{}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2, "padding_mode": "reflect"}]
    )
    def test_conv2d_reads_patches(self, options):
        """A convolution's Hessian is that of the linear layer over its patches: loss is its output's change."""
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 8, 3, bias=False, **options)
        x = torch.randn(4, 3, 10, 10)
        before = layer(x).detach()
        solver = SparseGPT(layer)
        solver.add_batch(x, before)
        solver.fasterprune(0.5)
        after = layer(x).detach()
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5)
        assert solver.loss == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-3)

    def test_transformers_conv1d(self):
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        layer = pytorch_utils.Conv1D(12, 32)  # weight [32, 12]
        solver = SparseGPT(layer)
        x = inputs(32, 100)
        before = layer(x).detach()
        solver.add_batch(x, before)
        solver.fasterprune(0.5)
        after = layer(x).detach()
        assert solver.loss == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-3)

    @pytest.mark.parametrize(
        ("call", "text"),
        [
            (lambda: SparseGPT(nn.Linear(8, 8)).fasterprune(0.5), "zero calibration tokens"),
            (lambda: SparseGPT(nn.Conv2d(4, 4, 1, groups=2)), "groups=2"),
            (lambda: GPTQ(nn.Linear(8, 8)).add_batch(torch.ones(2, 9), None), "x must be"),
            (lambda: Quantizer().configure(4, trits=True), "without trits"),
            (lambda: Quantizer().find_params(torch.ones(2, 2)), "weights only"),
        ],
    )
    def test_errors(self, call, text):
        with pytest.raises(ValueError, match=text):
            call()

    def test_free_then_solve(self):
        solver = GPTQ(nn.Linear(8, 8))
        solver.add_batch(torch.randn(20, 8), None)
        with pytest.raises(ValueError, match="set quantizer"):
            solver.fasterquant()
        solver.free()
        with pytest.raises(ValueError, match="after free"):
            solver.fasterquant()


def test_admm_mask_keeps_two_of_four_and_beats_the_greedy_one() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(32, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian = Hessian(64).add(x)
    greedy = sparsegpt(w, hessian, sparsity="2:4", mask="sparsegpt")
    together = sparsegpt(w, hessian, sparsity="2:4", mask="admm")
    assert torch.equal(together.mask.view(32, 16, 4).sum(-1), torch.full((32, 16), 2))
    assert together.loss < greedy.loss
    assert torch.equal(together.weight, sparsegpt(w, hessian, sparsity="2:4").weight)


def test_admm_mask_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r'mask="admm" needs refit=True'):
        sparsegpt(torch.randn(4, 8), torch.eye(8), sparsity="2:4", refit=False, mask="admm")
