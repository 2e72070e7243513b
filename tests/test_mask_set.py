"""MaskSet: whatever the optimizer, masked weights stay 0 and all others are trained as if the masked did not exist."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from scripts import said_by
from torch import nn

from llmkern.prune import MaskSet, magnitude_
from llmkern.prune.bits import Bits

transformers = pytest.importorskip("transformers")
SHAPES = ((6, 5), (3, 6))


class Masked(nn.Module):
    """The definition: weights times masks, inside the forward."""

    def __init__(self, model, masks):
        super().__init__()
        self.model, self.masks = model, masks

    def forward(self, x):
        for name, layer in self.model.named_children():
            x = nn.functional.linear(x, layer.weight * self.masks[f"{name}.weight"], layer.bias).tanh()
        return x


class Net(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x).tanh()
        return x


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Net(*(nn.Linear(k, n) for n, k in SHAPES)).to(dtype)


def half_pruned():
    """A model, its masks, and the same as `Masked`."""
    model = net()
    masks = magnitude_(model, 0.5)
    return model, masks, Masked(copy.deepcopy(model), {name: masks.mask(name) for name in masks.bits})


def step(model, optimizer, seed, micro=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(micro):
        x = torch.randn(7, SHAPES[0][1], generator=generator, dtype=torch.float64)
        target = torch.randn(7, SHAPES[-1][0], generator=generator, dtype=torch.float64)
        (model(x.to(next(model.parameters()).dtype)) - target).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def moments_at_zeros(model, masks, optimizer):
    """How many values of the weights' shape an optimizer keeps that are not 0 where the masks prune."""
    return sum(
        int((value[~masks.mask(name)] != 0).sum())
        for name in masks.bits
        for value in optimizer.state[model.get_parameter(name)].values()
        if torch.is_tensor(value) and value.shape == model.get_parameter(name).shape
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.03, weight_decay=0.1, foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.03, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.03),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.03),
}
OTHERS = {  # a weight's update depends on those around it
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1),
}


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_kept_weights_are_trained_as_if_the_others_did_not_exist(kind, gradients, micro):
    model, masks, wanted = half_pruned()
    optimizer, reference = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](wanted.parameters())
    masks.attach(optimizer, gradients=gradients)
    for seed in range(12):
        step(model, optimizer, seed, micro)
        step(wanted, reference, seed, micro)
        masks.check()
        assert moments_at_zeros(model, masks, optimizer) == 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted.model.get_parameter(name), rtol=1e-9, atol=1e-12)
    assert masks.sparsity() == sum(int((p == 0).sum()) for p in model.parameters()) / sum(n * k for n, k in SHAPES)


def test_adafactors_state_of_another_shape_is_left_alone():
    model, masks, _ = half_pruned()
    optimizer = OTHERS["adafactor"](model.parameters())
    masks.attach(optimizer)
    for seed in range(5):
        step(model, optimizer, seed)
        masks.check()
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            assert value.shape == parameter.shape or (value != 0).all()


def test_lbfgs_keeps_the_zeros():
    model, masks, _ = half_pruned()
    optimizer = OTHERS["lbfgs"](model.parameters())
    masks.attach(optimizer)
    x = torch.randn(7, SHAPES[0][1], dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    for _ in range(3):
        optimizer.step(closure)
        masks.check()
    assert closure().item() < before


def test_a_thousand_steps_of_adamw_keep_every_zero_and_without_masks_none():
    for attached in (True, False):
        model = net(torch.float32)
        masks = magnitude_(model, 0.5)
        places = {name: masks.mask(name) for name in masks.bits}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        if attached:
            masks.attach(optimizer)
        for seed in range(1000):
            step(model, optimizer, seed)
        left = sum(int((model.get_parameter(name)[~keep] == 0).sum()) for name, keep in places.items())
        assert left == (sum(int((~keep).sum()) for keep in places.values()) if attached else 0)


def test_momentum_from_before_the_masks_is_cleared_at_once():
    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    for seed in range(4):
        step(model, optimizer, seed)
    masks = magnitude_(model, 0.5)
    assert moments_at_zeros(model, masks, optimizer) > 0
    kept = {name: optimizer.state[model.get_parameter(name)]["momentum_buffer"].clone() for name in masks.bits}
    masks.attach(optimizer)
    assert moments_at_zeros(model, masks, optimizer) == 0
    for name, before in kept.items():
        now = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
        assert torch.equal(now, before * masks.mask(name))
    step(model, optimizer, 9)
    masks.check()


class WithCopies(torch.optim.Optimizer):
    """SGD on copies of the weights in higher precision, which nobody sees in `state`."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {})
        self.copies = [p.detach().double() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for parameter, own in zip(self.param_groups[0]["params"], self.copies, strict=True):
            own.sub_(parameter.grad.double(), alpha=0.1)
            parameter.copy_(own)


@pytest.mark.parametrize("gradients", [False, True])
def test_copies_of_the_weights_elsewhere_need_masked_gradients(gradients):
    model = net(torch.float32)
    masks = magnitude_(model, 0.5)
    optimizer = WithCopies(model.parameters())
    masks.attach(optimizer, gradients=gradients)
    for seed in range(3):
        step(model, optimizer, seed)
        masks.check()
    names = [name for name, _ in model.named_parameters()]
    drifted = sum(
        int((own[~masks.mask(name)] != 0).sum())
        for name, own in zip(names, optimizer.copies, strict=True)
        if name in masks
    )
    assert (drifted == 0) == gradients


class Coded(torch.Tensor):
    """Stands for a tensor that quantized optimizers keep: it looks like floats and holds codes."""


def test_what_an_optimizer_keeps_beside_values_per_weight():
    """A copy of the weights is a value per weight; codes are not, whose 0 may mean anything."""
    model, masks, _ = half_pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight
    state = {
        "copy": torch.ones_like(weight), "half": torch.ones_like(weight, dtype=torch.bfloat16),
        "codes": torch.full(weight.shape, 7, dtype=torch.uint8), "step": torch.tensor(3.0), "name": "x", "none": None,
        "coded": torch.ones(weight.shape).as_subclass(Coded), "row": torch.ones(1, weight.shape[1]),
        "turned": torch.ones(weight.T.shape),
    }  # fmt: skip
    optimizer.state[weight] = state
    masks.attach(optimizer)
    keep = masks.mask("0.weight")
    assert torch.equal(state["copy"], keep.double())
    assert torch.equal(state["half"], keep.bfloat16())
    assert (state["codes"] == 7).all()
    assert (state["coded"] == 1).all()
    assert state["step"] == 3
    assert (state["row"] == 1).all()
    assert (state["turned"] == 1).all()


def test_detached_masks_do_nothing_more():
    model, masks, _ = half_pruned()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks.attach(optimizer, gradients=True)
    masks.detach()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    step(model, optimizer, 0)
    with pytest.raises(ValueError, match=r"MaskSet.check: 0.weight: 15 weights are not 0 that the mask prunes"):
        masks.check()


def test_attached_again_only_the_last_call_counts():
    model, masks, _ = half_pruned()
    optimizer, other = (torch.optim.SGD([model[at].weight], lr=0.1) for at in (0, 1))
    masks.attach(optimizer, gradients=True).attach(optimizer).attach(other)
    assert [len(o._optimizer_step_post_hooks) for o in (optimizer, other)] == [1, 1]
    assert not optimizer._optimizer_step_pre_hooks
    new = magnitude_(model, 0.6, masks=masks)
    assert [len(o._optimizer_step_post_hooks) for o in (optimizer, other)] == [1, 1]
    new.detach()
    assert not optimizer._optimizer_step_post_hooks


def test_replace_keeps_the_masking_of_gradients():
    model, masks, _ = half_pruned()
    optimizer = WithCopies(model.parameters())
    masks.attach(optimizer, gradients=True)
    new = magnitude_(model, 0.5, masks=masks)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    new.detach()
    assert not optimizer._optimizer_step_pre_hooks


def test_apply_and_check_name_the_parameter():
    model, masks, _ = half_pruned()
    row, column = (~masks.mask("1.weight")).nonzero()[0].tolist()
    for value in (1e-30, float("nan"), -5.0):
        with torch.no_grad():
            model[1].weight[row, column] = value
        with pytest.raises(ValueError, match=r"1.weight: 1 weights are not 0"):
            masks.check()
        before = model[1].weight.detach().clone()
        masks.apply().check()
        assert torch.equal(model[1].weight, torch.where(masks.mask("1.weight"), before, 0))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
def test_from_model_finds_the_zeros(kind):
    model = getattr(tiny, kind)()
    made = magnitude_(model, "2:4")
    found = MaskSet.from_model(model).check("2:4")
    assert list(found.bits) == list(made.bits)
    for name in made.bits:
        assert torch.equal(found.mask(name), made.mask(name))
        assert found.bits[name].transposed == made.bits[name].transposed
    assert found.pattern == made.pattern == "2:4"
    assert found.nbytes * 8 == sum(bits.size for bits in found.bits.values())  # widths here are multiples of 8


def test_from_model_leaves_out_what_has_no_zeros():
    model = net()
    magnitude_(model, 0.5, targets=["1"])
    masks = MaskSet.from_model(model)
    assert list(masks.bits) == ["1.weight"]
    assert "1.weight" in masks
    assert "0.weight" not in masks
    assert len(masks) == 1
    assert masks.sparsity() == masks.sparsity("1.weight") == 0.5
    assert list(MaskSet.from_model(model, targets=["1"]).skipped) == ["0"]
    with pytest.raises(ValueError, match="no weight of a linear layer is 0"):
        MaskSet.from_model(net())
    with pytest.raises(ValueError, match="no weight of a linear layer is 0"):
        MaskSet.from_model(model, ignore=["1"])


def test_patterns():
    model = nn.ModuleList([nn.Linear(32, 8)])
    for pattern, at_most in [("1:2", "2:4"), ("2:4", "4:8"), ("4:8", "8:16"), ("3:4", "6:8"), ("3:6", "1:4")]:
        twin = copy.deepcopy(model)
        masks = magnitude_(twin, pattern).check(pattern)
        assert masks.pattern == (pattern if pattern != "3:6" else None)
        if pattern != "3:6":
            masks.check(at_most)
    assert magnitude_(copy.deepcopy(model), 0.5).pattern is None
    masks = magnitude_(copy.deepcopy(model), "4:8")
    with pytest.raises(ValueError, match=r"MaskSet.check: 0.weight: its mask is not 2:4"):
        masks.check("2:4")
    with pytest.raises(ValueError, match="pattern must be"):
        masks.check(0.5)


def test_a_short_last_group_keeps_no_more_than_a_whole_one():
    model = nn.ModuleList([nn.Linear(7, 3)])
    masks = magnitude_(model, "2:4").check("2:4")
    assert masks.pattern == "2:4"
    keep = masks.mask("0.weight")
    assert (keep[:, 4:].sum(1) == 2).all()
    keep[:, 4:] = True
    with pytest.raises(ValueError, match="not 2:4"):
        MaskSet(model, {"0.weight": keep}).check("2:4")


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 9), (2, 3, 17), (2, 0), (0, 4), (4, 2, 8)])
def test_bits_hold_what_was_packed(shape, poisoned):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    bits = Bits.pack(keep)
    assert torch.equal(bits.unpack(), keep)
    assert bits.zeros() == int((~keep).sum())
    assert bits.size == keep.numel()
    values = torch.randn(shape)
    cleared, turned = values.clone(), values.mT.clone(memory_format=torch.contiguous_format).mT
    bits.clear_(cleared, turned)
    assert torch.equal(cleared, values * keep)
    assert torch.equal(turned, values * keep)
    assert bits.revived(values) == int((~keep).sum())
    assert bits.revived(cleared) == 0


def test_bits_of_more_rows_than_one_part(monkeypatch):
    monkeypatch.setattr("llmkern.formats._base.PART", 20)
    test_bits_hold_what_was_packed((11, 9), None)
    test_bits_hold_what_was_packed((2, 11, 9), None)


def test_the_state_goes_round(tmp_path):
    model = tiny.gpt_oss()
    masks = magnitude_(model, "2:4")
    masks.save(tmp_path / "masks.safetensors")
    torch.save(masks.state_dict(), tmp_path / "masks.pt")
    other = tiny.gpt_oss()
    loaded = MaskSet.load(tmp_path / "masks.safetensors", other)
    empty = MaskSet(other, {})
    empty.load_state_dict(torch.load(tmp_path / "masks.pt", weights_only=True))
    for found in (loaded, empty):
        assert list(found.bits) == list(masks.bits)
        assert all(torch.equal(found.mask(name), masks.mask(name)) for name in masks.bits)
        assert found.apply().check("2:4").pattern == "2:4"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_loading_into_attached_masks_takes_effect():
    model, masks, _ = half_pruned()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks.attach(optimizer)
    step(model, optimizer, 0)
    denser = copy.deepcopy(masks.state_dict())
    denser["1.weight"]["bits"].zero_()
    masks.load_state_dict(denser)
    step(model, optimizer, 1)
    assert not model[1].weight.any()
    masks.check()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.update({"2.weight": s["1.weight"]}), "2.weight: .* but the model has no such parameter"),
        (lambda s: s["1.weight"].update(shape=[6, 3]), r"1.weight: no mask: ValueError: wanted uint8 \[6, 1\]"),
        (
            lambda s: s["1.weight"].update(Bits.pack(torch.ones(3, 7).bool()).__dict__),
            r"1.weight: the mask is for \[3, 7\], but the parameter is \[3, 6\]",
        ),
        (lambda s: s["1.weight"].pop("bits"), "1.weight: no mask: KeyError: 'bits'"),
        (lambda s: s["1.weight"].update(bits=torch.zeros(3, 1)), "wanted uint8"),
        (lambda s: s["1.weight"].update(bits=torch.full((3, 1), 255, dtype=torch.uint8)), "a pad bit beyond column 5"),
        (lambda s: s["1.weight"].update(bits=None), "1.weight: no mask"),
        (lambda s: s["1.weight"].update(shape=[3, -6]), "two or three sizes"),
        (lambda s: s["1.weight"].update(shape=[3]), "two or three sizes"),
        (lambda s: s["1.weight"].update(transposed="no"), "transposed='no'"),
        (lambda s: s.update({"1.weight": None}), "1.weight: no mask"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(change, text):
    model, masks, _ = half_pruned()
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(masks.state_dict())
    kept = dict(masks.bits)
    change(state)
    with pytest.raises(ValueError, match=text):
        masks.load_state_dict(state)
    assert masks.bits == kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_given_as_tensors_must_fit():
    model = net()
    with pytest.raises(TypeError, match=r"0.weight: the mask must be bool"):
        MaskSet(model, {"0.weight": torch.ones(6, 5)})
    with pytest.raises(ValueError, match=r"0.weight: the mask is for \[5, 6\], but the parameter is \[6, 5\]"):
        MaskSet(model, {"0.weight": torch.ones(5, 6).bool()})


def test_files_that_hold_no_masks(tmp_path):
    model, masks, _ = half_pruned()
    path = tmp_path / "masks.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        MaskSet.load(path, model)
    path.write_text("no")
    with pytest.raises(ValueError, match="holds no masks"):
        MaskSet.load(path, model)
    save_file({"0.weight": torch.zeros(6, 1, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match="holds no masks"):
        MaskSet.load(path, model)
    masks.save(path)
    tensors = load_file(path)
    for about in ("[]", "nonsense", json.dumps({"9.weight": {"shape": [6, 5], "transposed": False}})):
        save_file(tensors, path, metadata={"llmkern.masks": about})
        with pytest.raises(ValueError, match="holds no masks"):
            MaskSet.load(path, model)
    masks.save(path)  # takes the place of what is there
    assert MaskSet.load(path, model).sparsity() == masks.sparsity()
    with pytest.raises(ValueError, match=r"0.weight: the mask is for \[6, 5\]"):
        MaskSet.load(path, nn.Sequential(nn.Linear(4, 4)))


def test_optimizers_that_cannot_be_attached_to():
    model, masks, _ = half_pruned()
    with pytest.raises(TypeError, match=r"MaskSet.attach: wanted a torch.optim.Optimizer, got str"):
        masks.attach("adamw")
    with pytest.raises(ValueError, match="has none of the masked parameters"):
        masks.attach(torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="has none of the masked parameters"):
        masks.attach(torch.optim.SGD([model[0].bias], lr=0.1))


def test_a_model_that_changed_is_refused():
    model, masks, _ = half_pruned()
    model[1] = nn.Linear(6, 4)
    for work in (masks.apply, masks.check, lambda: masks.attach(torch.optim.SGD(model.parameters(), lr=0.1))):
        with pytest.raises(ValueError, match=r"1.weight: the mask is for \[3, 6\], but the parameter is \[4, 6\]"):
            work()


def test_wrapped_blocks_and_other_dtypes():
    """torch.compile and activation checkpointing put a word into names; a cast puts other tensors into parameters."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, masks, _ = half_pruned()
    model[0] = checkpoint_wrapper(model[0])
    model[1] = torch.compile(model[1], backend="eager")
    assert next(name for name, _ in model.named_parameters()) == "0._checkpoint_wrapped_module.weight"
    model.float()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks.attach(optimizer)
    step(model, optimizer, 0)
    masks.check()
    assert sum(int((p == 0).sum()) for p in model.parameters()) == 24


def test_parameters_that_take_the_place_of_others():
    model, masks, _ = half_pruned()
    masks.apply()
    model[0].weight = nn.Parameter(torch.ones(6, 5))
    masks.apply().check()
    assert int((model[0].weight == 0).sum()) == 15


def test_under_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, masks, wanted = half_pruned()
    optimizer, reference = OPTIMIZERS["adamw"](model.parameters()), OPTIMIZERS["adamw"](wanted.parameters())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    masks.attach(wrapped)
    for seed in range(6):
        for at in range(2):
            with accelerator.accumulate(prepared):
                x = torch.randn(7, SHAPES[0][1], generator=torch.Generator().manual_seed(2 * seed + at)).double()
                accelerator.backward(prepared(x).square().mean())
                wanted(x).square().mean().div(2).backward()
                wrapped.step()
                wrapped.zero_grad()
        reference.step()
        reference.zero_grad()
    masks.check()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted.model.get_parameter(name), rtol=1e-9, atol=1e-12)


def examples():
    ids = tiny.token_ids(16, 12)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **fields):
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True, **fields,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_under_the_stock_trainer(tmp_path, kind):
    model = getattr(tiny, kind)()
    masks = magnitude_(model, "2:4")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    masks.attach(optimizer)
    transformers.Trainer(
        model, arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2), train_dataset=examples(),
        optimizers=(optimizer, None),
    ).train()  # fmt: skip
    masks.check("2:4")
    for name in masks.bits:
        assert torch.equal(model.get_parameter(name) != 0, masks.mask(name))
        assert not torch.equal(model.get_parameter(name), before[name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Scenario -> what each rank said; see mask_ranks.py."""
    return said_by("mask_ranks.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("run", ["adamw", "fused", "sgd", "columns", "whole", "switched", "ddp"])
def test_ranks_train_what_one_trains(runs, run):
    (alone,) = (rank["value"] for rank in runs[f"alone_{run if run in ('sgd', 'columns') else 'adamw'}"])
    for rank in runs[run]:
        assert rank["code"] == 0
        assert "error" not in rank, rank
        assert not any(rank["value"].get("moments", []))
        for name, wanted in alone["weights"].items():
            got = torch.tensor(rank["value"]["weights"][name])
            torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-5)
            if name in alone["masks"]:
                assert torch.equal(got != 0, torch.tensor(alone["masks"][name]))


def test_masks_reach_the_shares_while_the_weights_are_gathered(runs):
    (alone,) = (rank["value"] for rank in runs["alone_adamw"])
    zeros = sum(int((~torch.tensor(mask)).sum()) for mask in alone["masks"].values())
    assert sum(rank["value"]["shares"] for rank in runs["gathered"]) == zeros


def test_a_rank_checks_its_own_share(runs):
    first, second = runs["revived"]
    assert first["value"] == {}
    assert second["error"].startswith("ValueError: MaskSet.check: 3.weight:")


def test_masks_are_made_before_a_model_is_sharded(runs):
    for rank in runs["late"]:
        assert "0.weight is spread over ranks; make the masks before the model is sharded" in rank["error"]


def test_masks_from_a_file_for_a_sharded_model(runs):
    (alone,) = (rank["value"] for rank in runs["alone_adamw"])
    for rank in runs["loaded"]:
        assert rank["value"]["sparsity"] == pytest.approx(0.5, abs=0.05)
        for name, mask in alone["masks"].items():
            assert torch.equal(torch.tensor(rank["value"]["weights"][name]) != 0, torch.tensor(mask))
