"""magnitude_: exactly the least weights go, no other value changes, and pruned weights never come back."""

import copy

import pytest
import tiny
import torch
from torch import nn

import llmkern
from llmkern import prune
from llmkern.prune import cubic_schedule, magnitude_
from llmkern.prune.matrices import find

pytest.importorskip("transformers")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def net(*sizes, dtype=torch.float32, coarse=False, seed=0):
    """Linear layers of these (out, in) features that follow no order; coarse: few different values, so many ties."""
    torch.manual_seed(seed)
    layers = [nn.Linear(k, n) for n, k in sizes]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.copy_(torch.randn_like(layer.weight) * (number + 1))
            if coarse:
                layer.weight.mul_(2).round_()
    return nn.ModuleList(layers).to(dtype)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def least(values, count, first=()):
    """The flat places of the `count` least |values| of a list of tensors; those in `first` before all others."""
    flat = torch.cat([value.double().abs().flatten() for value in values])
    flat[list(first)] = -1
    return flat.argsort(stable=True)[:count]


def assert_pruned(before, after, keep):
    """What is kept is bitwise as before, the rest is 0."""
    assert torch.equal(after, torch.where(keep, before, torch.zeros_like(before)))


def chunks_of(value, m):
    return [value[:, at : at + m] for at in range(0, value.shape[1], m)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77])
def test_each_layer_loses_its_share(dtype, coarse, share):
    model = net((7, 5), (3, 17), (1, 9), dtype=dtype, coarse=coarse)
    before = weights(model)
    masks = magnitude_(model, share)
    for name, weight in before.items():
        if name.endswith("bias"):
            assert torch.equal(model.get_parameter(name), weight)
            continue
        keep = torch.ones(weight.numel(), dtype=torch.bool)
        keep[least([weight], round(share * weight.numel()))] = False
        assert torch.equal(masks.mask(name), keep.view_as(weight))
        assert_pruned(weight, model.get_parameter(name), keep.view_as(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.6])
def test_all_layers_together_lose_their_share(dtype, coarse, share):
    model = net((7, 5), (30, 17), (1, 9), (16, 8), dtype=dtype, coarse=coarse)
    with torch.no_grad():
        model[0].weight[0, :2] = torch.tensor([-0.0, 0.0])
    before = {name: weight for name, weight in weights(model).items() if name.endswith("weight")}
    masks = magnitude_(model, share, scope="global")
    total = sum(weight.numel() for weight in before.values())
    keep = torch.ones(total, dtype=torch.bool)
    keep[least(before.values(), round(share * total))] = False
    for (name, weight), part in zip(before.items(), keep.split([w.numel() for w in before.values()]), strict=True):
        assert torch.equal(masks.mask(name), part.view_as(weight)), name
        assert_pruned(weight, model.get_parameter(name), part.view_as(weight))
    assert masks.sparsity() == pytest.approx(round(share * total) / total)


def test_a_threshold_between_neighbours():
    """Values a last bit apart, on both sides of a change of the upper bits, which are counted first."""
    row = torch.arange(-40, 40, dtype=torch.int32) + 0x3F810000
    model = net((2, 40))
    with torch.no_grad():
        model[0].weight.copy_(row[torch.randperm(80)].view(torch.float32).view(2, 40))
    before = model[0].weight.detach().clone()
    for count in (1, 39, 40, 41, 79):
        other = copy.deepcopy(model)
        magnitude_(other, count / 80, scope="global")
        kept = other[0].weight.detach()
        assert int((kept == 0).sum()) == count
        assert kept[kept != 0].min() > before[kept == 0].max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 13, 3, 5])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 3)])
def test_n_of_every_m_columns(dtype, columns, n, m):
    model = net((6, columns), dtype=dtype, coarse=True)
    before = weights(model)["0.weight"]
    masks = magnitude_(model, f"{n}:{m}").check(f"{n}:{m}")
    for part, keep in zip(chunks_of(before, m), chunks_of(masks.mask("0.weight"), m), strict=True):
        count = n if part.shape[1] == m else max(0, part.shape[1] - (m - n))
        for values, kept in zip(part, keep, strict=True):
            assert (~kept).nonzero().flatten().tolist() == sorted(least([values], count).tolist())
    assert_pruned(before, model[0].weight.detach(), masks.mask("0.weight"))


def test_a_conv1d_is_pruned_along_its_inputs():
    model = tiny.gpt2()
    name = "transformer.h.0.mlp.c_fc.weight"
    before = model.get_parameter(name).detach().clone()  # [K, N]
    masks = magnitude_(model, "2:4").check("2:4")
    keep = masks.mask(name)
    assert keep.shape == before.shape == (64, 256)
    groups = before.T.reshape(256, 16, 4).abs().double()
    wanted = torch.ones_like(groups, dtype=torch.bool)
    wanted.scatter_(-1, groups.argsort(dim=-1, stable=True)[..., :2], False)
    assert torch.equal(keep, wanted.view(256, 64).T)
    assert_pruned(before, model.get_parameter(name).detach(), keep)


@pytest.mark.parametrize(("kind", "axis"), [("mixtral", -1), ("gpt_oss", -2)])
def test_every_expert_is_a_layer(kind, axis):
    model = getattr(tiny, kind)()
    modules, before = dict(model.named_modules()), weights(model)
    half = copy.deepcopy(model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    magnitude_(model, "2:4").check("2:4")
    assert dict(model.named_modules()) == modules  # no expert is a module of its own any more
    pruned = model.get_parameter(name).detach()
    groups = (pruned if axis == -1 else pruned.mT).reshape(*pruned.mT.shape[:1], -1, 4)
    assert ((groups == 0).sum(-1) == 2).all()
    assert torch.equal(pruned[pruned != 0], before[name][pruned != 0])
    masks = magnitude_(half, 0.3)
    for expert, weight in zip(masks.mask(name), before[name], strict=True):
        count = round(0.3 * weight.numel())
        order = weight if axis == -1 else weight.T
        wanted = torch.ones(weight.numel(), dtype=torch.bool)
        wanted[least([order], count)] = False
        assert torch.equal(expert if axis == -1 else expert.T, wanted.view_as(order))
    for other in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.get_parameter(other), before[other])


def test_single_experts_as_targets():
    model = tiny.mixtral()
    name = "model.layers.0.mlp.experts.down_proj"
    masks = magnitude_(model, 0.5, targets=["model.layers.0.mlp.experts.2.down_proj"])
    assert list(masks.bits) == [name]
    assert [round(float((~expert).float().mean()), 6) for expert in masks.mask(name)] == [0, 0, 0.5, 0]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_again_is_nested(scope):
    model = net((12, 10), (8, 16))
    masks, shares = None, (0.0, 0.2, 0.5, 0.5, 0.8)
    for step, share in enumerate(shares):
        old = {} if masks is None else {name: masks.mask(name) for name in masks.bits}
        with torch.no_grad():  # as if a training had moved all weights, the pruned ones too
            for layer in model:
                layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(step)) * 3)
                if step % 2:
                    layer.weight.div_(2).round_()  # zeros too, which are not masked and go after those that are
        before = {name: weight for name, weight in weights(model).items() if name.endswith("weight")}
        masks = magnitude_(model, share, scope=scope, masks=masks)
        groups = [list(before)] if scope == "global" else [[name] for name in before]
        for names in groups:
            flat_old = torch.cat([old.get(name, torch.ones_like(before[name]).bool()).flatten() for name in names])
            count = round(share * len(flat_old))
            wanted = torch.ones_like(flat_old)
            first = (~flat_old).nonzero().flatten().tolist()
            wanted[least([before[name] for name in names], count, first)] = False
            assert torch.equal(torch.cat([masks.mask(name).flatten() for name in names]), wanted & flat_old)
        masks.check()
    assert masks.sparsity() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_less_than_before_keeps_all_zeros(scope):
    model = net((12, 10), (8, 16))
    first = magnitude_(model, 0.6, scope=scope)
    with torch.no_grad():
        for layer in model:
            layer.weight.normal_()
    second = magnitude_(model, 0.25, scope=scope, masks=first)
    assert all(torch.equal(first.mask(name), second.mask(name)) for name in first.bits)
    second.check()


def test_from_2_of_4_to_a_share_and_the_masks_of_other_layers_stay():
    model = net((8, 16), (8, 16))
    first = magnitude_(model, "2:4", targets=["0"])
    second = magnitude_(model, 0.75, targets=["1"], masks=first)
    assert second.sparsity("1.weight") == 0.75
    assert torch.equal(second.mask("0.weight"), first.mask("0.weight"))
    third = magnitude_(model, 0.625, targets=["0"], masks=second)
    assert third.sparsity("0.weight") == 0.625
    assert not (third.mask("0.weight") & ~first.mask("0.weight")).any()


def test_an_optimizer_gets_the_new_masks():
    model = net((8, 16), (8, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = magnitude_(model, 0.25).attach(optimizer)
    second = magnitude_(model, 0.5, masks=first)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    second.check()


def test_targets_and_what_is_skipped():
    model = tiny.llama()
    masks = magnitude_(model, 0.5, targets=["re:.*mlp"], ignore=["re:.*layers.0", "lm_head"])
    assert list(masks.bits) == [
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (1, 2) for part in ("gate", "up", "down")
    ]
    assert masks.skipped["model.layers.0.mlp.up_proj"] == "ignored by 're:.*layers.0'"
    assert masks.skipped["model.layers.1.self_attn.q_proj"] == "not among the targets"
    assert "as routers do" in magnitude_(tiny.mixtral(), 0.5).skipped["model.layers.0.mlp.gate"]


def test_a_block_that_runs_several_times_is_pruned_once():
    masks = magnitude_(tiny.albert(), 0.5)
    assert len(masks) == len(set(masks.bits)) == 8
    assert masks.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_layers_that_share_a_weight_are_left_out():
    model = net((8, 8), (8, 8), (8, 8))
    model[1].weight = model[0].weight
    masks = magnitude_(model, 0.5)
    assert list(masks.bits) == ["2.weight"]
    assert "tied" in masks.skipped["0"]


def spoiled(change):
    model = net((8, 16), (8, 16))
    with torch.no_grad():
        change(model)
    return model


def tied_head(**fields):
    return tiny.llama(tie_word_embeddings=True, **fields)


@pytest.mark.parametrize(
    ("build", "args", "text"),
    [
        (lambda: net((8, 16)), {"sparsity": 1.0}, r"in \[0, 1\)"),
        (lambda: net((8, 16)), {"sparsity": -0.1}, r"in \[0, 1\)"),
        (lambda: net((8, 16)), {"sparsity": True}, r"in \[0, 1\)"),
        (lambda: net((8, 16)), {"sparsity": "4:2"}, "0 < n < m"),
        (lambda: net((8, 16)), {"sparsity": "half"}, "n:m"),
        (lambda: net((8, 16)), {"sparsity": 0.5, "scope": "model"}, "scope must be one of 'layer', 'global'"),
        (lambda: net((8, 16)), {"sparsity": "2:4", "scope": "global"}, 'scope must be "layer"'),
        (lambda: net((8, 16)), {"sparsity": 0.5, "targets": ["mlp"]}, "matches no linear layer"),
        (lambda: net((8, 16), (1, 2)), {"sparsity": 0.8}, "nothing would be left of layer 1"),
        (lambda: net((8, 16), (8, 16)), {"sparsity": 0.999}, "nothing would be left of layer 0"),
        (
            lambda: spoiled(lambda model: model[1].weight.mul_(1e-6)), {"sparsity": 0.6, "scope": "global"},
            "nothing would be left of layer 1",
        ),
        (
            lambda: spoiled(lambda model: model[1].weight[0, 0].fill_(float("nan"))), {"sparsity": 0.5},
            r"NaN or an infinity \(layer 1\)",
        ),
        (
            lambda: spoiled(lambda model: model[1].weight[0, 0].fill_(float("inf"))),
            {"sparsity": 0.5, "scope": "global"}, r"NaN or an infinity \(layer 1\)",
        ),
        (tied_head, {"sparsity": 0.5, "ignore": ()}, "layer lm_head: its weight is also that of model.embed_tokens"),
        (lambda: nn.ModuleList([nn.ReLU()]), {"sparsity": 0.5}, "no linear layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_changes_nothing(build, args, text):
    model = build()
    before = weights(model)
    with pytest.raises(ValueError, match=text):
        magnitude_(model, **args)
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name).nan_to_num(), weight.nan_to_num())


def test_models_whose_weights_are_not_here():
    with pytest.raises(ValueError, match=r"0.weight has no values: it is on the meta device"):
        magnitude_(net((8, 16)).to("meta"), 0.5)
    packed = net((8, 16))
    llmkern.patch(packed, "magnitude-2:4")
    with pytest.raises(ValueError, match="packed already"):
        magnitude_(packed, 0.5)


def test_the_masks_of_another_model_change_nothing():
    masks = magnitude_(net((8, 16), (8, 16)), 0.5)
    for other, text in [(net((8, 16), (8, 12)), r"1.weight: the mask is for \[8, 16\]"), (net((8, 16)), "no such")]:
        before = weights(other)
        with pytest.raises(ValueError, match=text):
            magnitude_(other, 0.7, masks=masks)
        assert all(torch.equal(other.get_parameter(name), weight) for name, weight in before.items())


def test_masks_of_a_copy_go_on():
    model = net((8, 16))
    masks = magnitude_(model, 0.25)
    twin = copy.deepcopy(model)
    assert not (magnitude_(twin, 0.5, masks=masks).mask("0.weight") & ~masks.mask("0.weight")).any()
    assert int((model[0].weight == 0).sum()) == 32


def test_one_matrix_per_expert_is_a_view_of_its_parameter():
    model = tiny.gpt_oss()
    found, _ = find("test", model)
    name = "model.layers.0.mlp.experts.down_proj"
    whole = model.get_parameter(name).detach()
    assert [matrix.layer for matrix in found[name]] == [f"model.layers.0.mlp.experts.{at}.down_proj" for at in range(4)]
    for at, matrix in enumerate(found[name]):
        assert matrix.of(whole).data_ptr() == matrix.weight.data_ptr() == whole[at].data_ptr()
        assert torch.equal(matrix.of(whole), whole[at].T)


def test_the_cubic_schedule():
    shares = [cubic_schedule(step, start=2, end=12, initial=0.1, final=0.9) for step in range(16)]
    assert shares[:3] == [0.1] * 3
    assert shares[12:] == [0.9] * 4
    for step in range(2, 13):
        assert shares[step] == pytest.approx(0.9 - 0.8 * (1 - (step - 2) / 10) ** 3, abs=1e-12)
    assert cubic_schedule(7, start=2, end=12, final=0.8) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "args",
    [
        {"start": 5, "end": 5, "final": 0.5},
        {"start": 0, "end": 5, "final": 1.0},
        {"start": 0, "end": 5, "initial": 0.6, "final": 0.5},
        {"start": 0, "end": 5, "initial": -0.1, "final": 0.5},
    ],
)
def test_a_schedule_that_is_none(args):
    with pytest.raises(ValueError, match="cubic_schedule: wanted"):
        cubic_schedule(0, **args)


def test_it_is_reached_from_the_package():
    assert llmkern.prune is prune
