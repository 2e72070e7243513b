import weakref

import pytest
import tiny
import torch

import llmkern
from llmkern import layer_solver, patching
from llmkern.nn import PackedLinear, dense_weight, is_linear
from llmkern.solvers import rtn

KINDS = ("llama", "gemma3", "gpt2", "opt", "bert", "t5")
METHODS = (
    "gptq-int4-g32", "gptq-int8", "gptq-int3-g32", "gptq-w8a8", "wanda-2:4", "wanda-2:4-int4-g32", "sparsegpt-0.5",
    "sparsegpt-2:4", "sparsegpt-2:4-int4-g32", "sparsegpt-4:8",
)  # fmt: skip


# Whose Hessians are the plain second moments of the inputs.
BY_LAYER = llmkern.Recipe.parse("gptq-int4-g32", objective="layer")


def compress(model, recipe, calibration, **fields):
    return llmkern.compress(model, recipe, calibration, progress=False, **fields)


def calibration_of(kind, n=11):
    ids = tiny.token_ids(n)
    return ids if kind != "t5" else [tiny.inputs(kind, part) for part in ids.split(4)]


def packed_names(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def second_moments(kind, model, layers, batches):
    """Layer -> Σ xxᵀ of its inputs over all batches through the whole model: no capture, no sharing."""
    sums = dict.fromkeys(layers, 0)

    def hook(name):
        def add(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums[name] + x.T @ x

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return sums


def blocks_in_order(model, kind):
    """The layers of each block in the order in which they run, found by name: the test knows these models."""
    prefixes = {
        "llama": "model.layers.", "gemma3": "model.layers.", "gpt2": "transformer.h.",
        "opt": "model.decoder.layers.", "bert": "bert.encoder.layer.",
    }  # fmt: skip
    roots = ["encoder.block.", "decoder.block."] if kind == "t5" else [prefixes[kind]]
    for root in roots:
        names = [name for name, module in model.named_modules() if name.startswith(root) and is_linear(module)]
        for at in sorted({int(name[len(root) :].split(".")[0]) for name in names}):
            yield [name for name in names if name.startswith(f"{root}{at}.")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_hessian_is_that_of_the_compressed_model_so_far(kind, monkeypatch):
    """Brute force: the whole model on all data, once per layer, against what `compress` gave the solver."""
    seen = {}

    def solve(weight, hessian, recipe, *others):
        seen[weight.data_ptr()] = hessian.raw().clone()
        return rtn(weight, None, bits=4, group_size=32)

    monkeypatch.setattr(patching, "solve", solve)
    model, twin = tiny.MODELS[kind](), tiny.MODELS[kind]()
    pointers = {name: module.weight.data_ptr() for name, module in model.named_modules() if is_linear(module)}
    calibration = calibration_of(kind)
    compress(model, BY_LAYER, calibration)
    batches = calibration if kind == "t5" else [tiny.inputs(kind, calibration)]
    for layers in blocks_in_order(twin, kind):
        for name in layers:
            wanted = second_moments(kind, twin, [name], batches)[name]
            got = seen[pointers[name]].double()
            assert (got - wanted).norm() < 1e-4 * wanted.norm(), name
            weight = dense_weight(twin.get_submodule(name))
            weight.copy_(rtn(weight, None, bits=4, group_size=32).weight)


@pytest.mark.parametrize("kind", [*KINDS, "albert"])
def test_every_linear_layer_is_replaced_or_reported(kind):
    model = tiny.MODELS[kind]()
    ids = tiny.token_ids(2)
    before = tiny.output(kind, model, ids)
    linears = {name for name, module in model.named_modules() if is_linear(module)}
    report = compress(model, "gptq-int8", calibration_of(kind))
    assert {row.name for row in report.rows} == packed_names(model)
    assert {row.name for row in report.rows} | {skip.name for skip in report.skipped} == linears
    after = tiny.output(kind, model, ids)
    assert (after - before).norm() < 0.05 * before.norm()
    assert all(0 < row.loss < 1e-3 and row.damp == 0.01 and row.tokens for row in report.rows)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_beats_doing_it_without_data(method):
    ids = tiny.token_ids(24)
    free = method.replace("gptq", "rtn").replace("wanda", "magnitude").replace("sparsegpt", "magnitude")
    wanted = tiny.output("llama", tiny.llama(), ids)
    errors = []
    for recipe in (method, free):
        model = tiny.llama()
        report = compress(model, recipe, ids)
        assert report.recipe == str(llmkern.Recipe.parse(recipe))
        errors.append((tiny.output("llama", model, ids) - wanted).norm() / wanted.norm())
    slack = 1.1 if "8" in method.split("-", 1)[1] and "gptq" in method else 1.0  # int8: both are near exact
    assert errors[0] < slack * errors[1]


def test_all_forms_of_calibration_give_the_same():
    ids = tiny.token_ids(12)

    def run(model):
        for part in ids.split(8):
            model(input_ids=part, attention_mask=torch.ones_like(part))

    forms = [
        ids, list(ids.split(8)), (part for part in ids.split(8)), [{"input_ids": part} for part in ids.split(8)],
        [{"input_ids": part, "labels": part, "use_cache": True} for part in ids.split(8)], run,
    ]  # fmt: skip
    losses = []
    for form in forms:
        report = compress(tiny.llama(), "gptq-int4-g32", form)
        assert report.tokens == ids.numel()
        losses.append([row.loss for row in report.rows])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_does_not_count(kind):
    ids = tiny.token_ids(4)
    padded = torch.nn.functional.pad(ids, (0, 8))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 8))
    plain = compress(tiny.MODELS[kind](), BY_LAYER, ids)
    report = compress(tiny.MODELS[kind](), BY_LAYER, [{"input_ids": padded, "attention_mask": mask}])
    assert report.tokens == plain.tokens == ids.numel()
    assert [row.tokens for row in report.rows] == [row.tokens for row in plain.rows]
    assert [row.loss for row in report.rows] == pytest.approx([row.loss for row in plain.rows], rel=1e-3)


class Scaled(torch.nn.Module):
    """Between the blocks something happens, so no block's input is the output of the one before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(3))

    def forward(self, x):
        for at, block in enumerate(self.blocks):
            x = torch.tanh(block(x * (at + 1)))
        return x


def test_blocks_that_are_not_chained_are_captured_again(monkeypatch):
    seen = []

    def solve(weight, hessian, recipe, *others):
        seen.append(hessian.raw().clone())
        return rtn(weight, None, bits=4, group_size=16)

    monkeypatch.setattr(patching, "solve", solve)
    model, x = Scaled(), torch.randn(10, 16)
    compress(model, llmkern.Recipe.parse("gptq-int4", objective="layer"), [x])
    hidden = x
    for at, block in enumerate(model.blocks):
        hidden = hidden * (at + 1)
        torch.testing.assert_close(seen[at], hidden.T @ hidden, rtol=1e-4, atol=1e-4)
        hidden = torch.tanh(hidden @ block[0].unpack().T + block[0].bias).detach()


def test_a_model_without_blocks_is_calibrated_as_a_whole():
    model = tiny.mlp()
    report = compress(model, "gptq-int4-g16", [torch.randn(20, 32)])
    assert packed_names(model) == {"0", "2"}
    assert [row.tokens for row in report.rows] == [20, 20]
    assert all(any("outside the repeated blocks" in note for note in row.notes) for row in report.rows)


def test_the_head_is_compressed_on_request():
    model = tiny.llama()
    report = compress(model, llmkern.Recipe.parse("gptq-int4-g32", ignore=()), tiny.token_ids())
    assert "lm_head" in packed_names(model)
    assert report.skipped == []


def test_overrides_and_targets_reach_single_layers():
    model = tiny.llama()
    overrides = {"layers.0.mlp.down_proj": "rtn-int8", "q_proj": None}
    recipe = llmkern.Recipe.parse("gptq-int4-g32", targets=["re:model.layers.[01]"], overrides=overrides)
    report = compress(model, recipe, tiny.token_ids())
    methods = {row.name: row.method for row in report.rows}
    assert methods["model.layers.0.mlp.down_proj"] == "rtn-int8"
    assert methods["model.layers.1.mlp.down_proj"] == "gptq-int4-g32"
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(model.model.layers[2].mlp.down_proj) is torch.nn.Linear
    assert not any(row.notes for row in report.rows)  # rtn among calibrated layers knows its Hessian too


def test_what_was_set_on_the_model_is_set_again():
    model = tiny.llama().train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    compress(model, "gptq-int4-g32", tiny.token_ids())
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert model.config.use_cache
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_result_can_be_trained_through():
    model = tiny.llama()
    compress(model, "gptq-int4-g32", tiny.token_ids())
    model(tiny.token_ids(2)).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_data_free_recipes_need_no_calibration():
    model = tiny.llama()
    report = compress(model, "rtn-int4-g32", None)
    assert len(report.rows) == 21
    assert report.tokens == 0
    assert "was not used" in compress(tiny.llama(), "rtn-int8", tiny.token_ids()).notes[0]


def test_a_16_bit_model_stays_one():
    model = tiny.llama().to(torch.bfloat16)
    compress(model, "sparsegpt-2:4-int4-g32", tiny.token_ids())
    assert {layer.scales.dtype for layer in model.modules() if isinstance(layer, PackedLinear)} == {torch.bfloat16}
    assert torch.isfinite(tiny.output("llama", model, tiny.token_ids(2))).all()


@pytest.mark.parametrize(("recipe", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cast_reaches_the_whole_model(recipe, dtype):
    model = tiny.llama()
    report = compress(model, recipe, None)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert report.totals["ratio"] == 2
    assert all(0 < row.loss < 1e-4 for row in report.rows)


def test_a_weight_beyond_the_casts_range_is_refused():
    model = tiny.mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="layer 2: a weight is not finite in float16"):
        compress(model, "fp16", None)
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("calibration", "error", "text"),
    [
        (None, ValueError, "needs calibration"),
        (torch.zeros(0, 8, dtype=torch.long), ValueError, "zero calibration tokens"),
        (torch.zeros(4, 0, dtype=torch.long), ValueError, "zero calibration tokens"),
        ([], ValueError, "zero calibration tokens"),
        (lambda model: None, ValueError, "zero calibration tokens"),
        (
            [{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}],
            ValueError,
            "zero cali",
        ),
        (torch.zeros(8, dtype=torch.long), ValueError, r"must be \[n, L\]"),
        (torch.zeros(2, 8), TypeError, "must be integers"),
        (torch.full((2, 8), 1000), ValueError, r"must be in \[0, 96\)"),
        (["some text"], TypeError, "must be a tensor or a mapping, got str"),
    ],
)
def test_bad_calibration_is_refused(calibration, error, text):
    model = tiny.llama()
    with pytest.raises(error, match=text) as caught:
        compress(model, "gptq-int4-g32", calibration)
    assert "\n" not in str(caught.value)
    assert packed_names(model) == set()


def test_a_group_beyond_any_layer_is_refused_before_the_first_layer_changes():
    model = tiny.llama()
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj .*group_size must be in \[1, K=64\]"
    ):
        compress(model, "gptq-int4-g96", tiny.token_ids())
    assert packed_names(model) == set()


def test_a_device_is_where_blocks_run_and_not_where_the_model_stays():
    model = tiny.llama()
    plain = compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids())
    report = compress(model, "gptq-int4-g32", tiny.token_ids(), device="cpu")
    assert [row.loss for row in report.rows] == pytest.approx([row.loss for row in plain.rows], rel=1e-4)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.o_proj.*non-finite"):
        compress(model, "gptq-int4-g32", tiny.token_ids())


@pytest.mark.parametrize("kind", ["mlp", "mixtral"])
def test_a_hessian_goes_when_its_layers_are_solved(kind, monkeypatch):
    keep, seen, alive = layer_solver.solve_and_keep, [], []

    def record(caller, name, layer, hessian, *rest):
        if all(other() is not hessian for other in seen):
            alive.append(sum(other() is not None for other in seen))
            seen.append(weakref.ref(hessian))
        return keep(caller, name, layer, hessian, *rest)

    monkeypatch.setattr(layer_solver, "solve_and_keep", record)
    data = [torch.randn(60, 32)] if kind == "mlp" else tiny.token_ids(20)
    compress(getattr(tiny, kind)(), "gptq-int4-g16", data)
    assert len(seen) > 1
    assert set(alive) == {0}


def test_an_error_in_the_middle_leaves_a_model_that_runs():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj .*20 of 21 layers are changed already"):
        compress(model, "gptq-int4-g32", tiny.token_ids())
    assert len(packed_names(model)) == 14
    assert tiny.output("llama", model, tiny.token_ids(2)).shape == (2, tiny.LENGTH, tiny.VOCABULARY)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Unused(Scaled):
    def __init__(self):
        super().__init__()
        self.spare = torch.nn.Linear(16, 16)


def test_a_layer_that_saw_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="layer spare saw no calibration tokens"):
        compress(Unused(), "gptq-int4", [torch.randn(10, 16)])


def test_compressing_twice_is_refused():
    model = tiny.llama()
    compress(model, "rtn-int8", None)
    with pytest.raises(ValueError, match="packed already"):
        compress(model, "gptq-int4-g32", tiny.token_ids())


def test_progress_goes_to_stderr(capsys):
    llmkern.compress(tiny.llama(), "rtn-int8")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "21/21" in captured.err
    compress(tiny.llama(), "rtn-int8", None)
    assert capsys.readouterr().err == ""
