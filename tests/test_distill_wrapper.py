"""DistillWrapper: its loss is the definition's, its parameters are the student's, and it says what does not fit."""

import copy

import pytest
import tiny
import torch
from torch import nn

from llmkern.distill import DistillWrapper, cosine, drop_layers, squarehead
from llmkern.ops import linear_kl_div

transformers = pytest.importorskip("transformers")

from distill_models import DECODERS, HEADS, batch_of, close, definition, gradients, pair  # noqa: E402

# Left of all tokens Gemma 2's own attention gives NaN in fp64.
CASES = [(kind, side) for kind in HEADS for side in ("right", "left") if (kind, side) != ("gemma2", "left")]


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_loss_and_gradients_are_the_definitions(kind, side):
    student, teacher = pair(kind)
    batch, options = batch_of(kind, side), {"temperature": 1.7, "ce_weight": 0.3}
    wrapper = DistillWrapper(student, teacher, **options)
    found = wrapper(**batch)
    wanted = definition(student, teacher, batch, kind in DECODERS, **options)
    for name, value in zip(("loss", "divergence", "cross_entropy", "agreement"), wanted, strict=True):
        torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-9, check_dtype=False)
        assert found[name].requires_grad == (name == "loss")
        assert found[name].shape == ()
    assert close(gradients(student, found["loss"]), gradients(student, wanted[0]))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "reverse_kl"},
        {"kind": "jsd", "beta": 0.2},
        {"kind": "skew_kl", "alpha": 0.3},
        {"t2_scale": False},
        {"workspace_mb": 1},
    ],
)
def test_options_reach_the_loss(options):
    student, teacher = pair("llama")
    batch = batch_of("llama")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    mine, theirs = (model.model(**inputs).last_hidden_state for model in (student, teacher))
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).masked_fill(
        batch["attention_mask"] == 0, -100
    )
    wanted = linear_kl_div(
        mine, student.lm_head.weight, theirs, teacher.lm_head.weight, labels, temperature=2.0, **options
    )
    found = DistillWrapper(student, teacher, temperature=2.0, **options)(**batch)
    torch.testing.assert_close(found["loss"], wanted.loss)
    default = DistillWrapper(student, teacher, temperature=2.0)(**batch)["loss"]
    assert ("workspace_mb" in options) == bool(torch.isclose(found["loss"], default))


def test_without_labels_every_token_counts_that_is_no_padding():
    for kind in ("llama", "bert"):
        student, teacher = pair(kind)
        batch = batch_of(kind)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        del batch["labels"]
        found = DistillWrapper(student, teacher)(**batch)
        wanted = definition(student, teacher, {**batch, "labels": labels}, kind == "llama")
        torch.testing.assert_close(found["loss"].double(), wanted[0], rtol=1e-6, atol=1e-9)


def test_no_logits_are_made_after_the_first_batch():
    student, teacher = pair("llama")
    wrapper = DistillWrapper(student, teacher)
    wrapper(**batch_of("llama"))
    made = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.numel()))
    wrapper(**batch_of("llama"))
    assert made == [0, 0]


def test_parameters_state_and_modes_are_the_students_alone():
    student, teacher = tiny.gpt2(resid_pdrop=0.5), tiny.gpt2(resid_pdrop=0.5)
    before = copy.deepcopy(teacher.state_dict())
    wrapper = DistillWrapper(student, teacher)
    assert [id(p) for p in wrapper.parameters()] == [id(p) for p in student.parameters()]
    assert list(wrapper.state_dict()) == [f"student.{name}" for name in student.state_dict()]
    teacher.train()
    wrapper.train()
    wrapper(**batch_of("llama"))["loss"].backward()
    assert student.training
    assert not teacher.training  # no dropout in what is learnt from
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert teacher.transformer.wte.weight.grad is None
    assert wrapper.teacher is teacher
    assert wrapper.double() is wrapper
    assert student.dtype == torch.float64
    assert teacher.dtype == torch.float32


def test_what_is_asked_of_the_wrapper_the_student_answers():
    student, teacher = tiny.llama(num_hidden_layers=1), tiny.llama()
    wrapper = DistillWrapper(student, teacher)
    assert isinstance(wrapper, transformers.PreTrainedModel)
    assert wrapper.config is student.config
    assert wrapper.generation_config is student.generation_config
    assert wrapper.get_output_embeddings() is student.lm_head
    assert wrapper.can_generate()
    ids = tiny.token_ids(2, 5)
    assert torch.equal(
        wrapper.generate(ids, max_new_tokens=4, do_sample=False),
        student.generate(ids, max_new_tokens=4, do_sample=False),
    )
    wrapper.gradient_checkpointing_enable()
    assert student.is_gradient_checkpointing
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapper.no_such_thing


def test_a_copy_is_of_both_models():
    wrapper = DistillWrapper(*pair("tied", torch.float32))
    other = copy.deepcopy(wrapper)
    wanted = wrapper(**batch_of("llama"))["loss"]
    with torch.no_grad():
        for model in (wrapper.student, wrapper.teacher):
            model.lm_head.weight.zero_()
    assert torch.equal(other(**batch_of("llama"))["loss"], wanted)


def test_a_state_dict_of_the_wrapper_or_of_the_student_is_loaded():
    student, teacher = pair("llama", torch.float32)
    wrapper = DistillWrapper(student, teacher)
    for state in (wrapper.state_dict(), student.state_dict()):
        other = DistillWrapper(tiny.llama(), teacher)
        other.load_state_dict(copy.deepcopy(state))
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), wrapper.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapper.load_state_dict({"student.lm_head.weight": student.lm_head.weight})


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_save_pretrained_is_the_students(kind, tmp_path):
    student, teacher = pair(kind, torch.float32)
    wrapper = DistillWrapper(student, teacher)
    wrapper.save_pretrained(tmp_path / "own")
    wrapper.save_pretrained(tmp_path / "gathered", state_dict=wrapper.state_dict())
    for folder in ("own", "gathered"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(tiny.token_ids()).logits, student(tiny.token_ids()).logits)


@pytest.mark.parametrize("hidden", [None, "squarehead"])
def test_parts_of_a_batch_add_up_with_num_items(hidden):
    student, teacher = pair("llama")
    batch = batch_of("llama", n=4)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = batch["input_ids"]  # as many rows in each part: the hidden loss is a mean of tokens in each
    wrapper = DistillWrapper(student, teacher, ce_weight=0.5, hidden=hidden)
    whole = wrapper(**batch)
    items = batch["labels"][:, 1:].numel()
    parts = [
        wrapper(**{k: v[rows] for k, v in batch.items()}, num_items_in_batch=items)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    for name in ("divergence", "cross_entropy"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])
    if hidden is None:
        torch.testing.assert_close(sum(part["loss"] for part in parts), whole["loss"])
    else:
        each = [wrapper(**{k: v[rows] for k, v in batch.items()})["hidden"] for rows in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close(sum(part["hidden"] for part in parts), sum(each) / 2)


def test_a_part_without_labels_that_count_has_loss_0_and_gradients():
    student, teacher = pair("llama")
    batch = batch_of("llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = DistillWrapper(student, teacher)(**batch, num_items_in_batch=torch.tensor(7))
    found["loss"].backward()
    assert found["loss"] == 0
    assert all((parameter.grad == 0).all() for parameter in student.parameters() if parameter.grad is not None)
    assert student.lm_head.weight.grad is not None


def test_hidden_losses_are_the_definitions():
    student, teacher = tiny.llama(num_hidden_layers=2).double(), tiny.llama(num_hidden_layers=5).double()
    batch = batch_of("llama")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    kept = batch["attention_mask"].bool()

    def blocks(model):
        found = []
        handles = [
            layer.register_forward_hook(lambda m, a, output: found.append(output)) for layer in model.model.layers
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        return found

    mine, theirs = blocks(student), [tensor.detach() for tensor in blocks(teacher)]
    plain = DistillWrapper(student, teacher)(**batch)["loss"]

    def square(s, t):
        a, b = mine[s][kept], theirs[t][kept]
        return ((a - b) ** 2).mean() / (b**2).mean()

    def angle(s, t):
        a, b = mine[s][kept], theirs[t][kept]
        return (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()

    cases = (
        ("squarehead", None, square(0, 1) + square(1, 4)), ("squarehead", [(1, 3)], square(1, 3)),
        ("cosine", None, angle(1, 4)), ("cosine", [(0, 0), (1, 2)], angle(0, 0) + angle(1, 2)),
    )  # fmt: skip
    for kind, layers, wanted in cases:
        found = DistillWrapper(student, teacher, hidden=kind, layers=layers, hidden_weight=0.7)(**batch)
        torch.testing.assert_close(found["hidden"].double(), wanted.detach(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["loss"], plain + 0.7 * wanted, rtol=1e-5, atol=1e-7, check_dtype=False)
        grads = gradients(student, found["loss"])
        assert (
            close(
                grads,
                gradients(student, DistillWrapper(student, teacher)(**batch)["loss"] + 0.7 * wanted.clone()),
                1e-5,
            )
            if layers == [(1, 3)]
            else grads
        )


def test_hidden_losses_by_themselves():
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    assert squarehead(b, b) == 0
    assert abs(float(cosine(b, 3 * b))) < 1e-6
    assert float(cosine(-b, b)) == pytest.approx(2)
    assert float(squarehead(a, b)) == pytest.approx(float(((a - b) ** 2).sum() / (b**2).sum()), rel=1e-6)
    assert torch.isfinite(squarehead(a, torch.zeros_like(b)))


@pytest.mark.parametrize("hidden", [None, "squarehead"])
def test_gradient_checkpointing_changes_no_gradient(hidden):
    student, teacher = pair("llama")
    wrapper = DistillWrapper(student, teacher, hidden=hidden).train()
    wanted = gradients(student, wrapper(**batch_of("llama"))["loss"])
    wrapper.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert close(gradients(student, wrapper(**batch_of("llama"))["loss"]), wanted, 1e-9)


def test_a_hook_that_runs_without_a_graph_is_refused():
    from llmkern.distill.hidden import outputs_of

    layer = nn.Linear(3, 3)
    with outputs_of({0: layer}, {}), torch.no_grad(), pytest.raises(ValueError, match="use_reentrant=False"):
        layer(torch.ones(1, 3))


def test_autocast_computes_in_bf16_and_gives_gradients_in_fp32():
    student, teacher = pair("llama", torch.float32)
    wrapper = DistillWrapper(student, teacher)
    wanted = wrapper(**batch_of("llama"))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = DistillWrapper(student, teacher)(**batch_of("llama"))["loss"]
    assert found.dtype == torch.float32
    assert found != wanted
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.02)
    found.backward()
    assert student.lm_head.weight.grad.dtype == torch.float32


def test_a_student_in_bf16_with_hidden_states_of_another_dtype():
    student, teacher = pair("llama", torch.bfloat16)
    student.model.norm.register_forward_hook(lambda module, args, output: output.float())
    student.lm_head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    assert torch.isfinite(DistillWrapper(student, teacher)(**batch_of("llama"))["loss"])


def test_classes_beyond_the_smaller_head_do_not_count():
    student, teacher = pair("llama")
    larger = tiny.llama(vocab_size=tiny.VOCABULARY + 5).double()
    batch = batch_of("llama")
    found = DistillWrapper(student, larger, shared_prefix=True)(**batch)["loss"]
    with torch.no_grad():
        teacher.model.load_state_dict(
            {k: v[: tiny.VOCABULARY] if "embed" in k else v for k, v in larger.model.state_dict().items()}
        )
        teacher.lm_head.weight.copy_(larger.lm_head.weight[: tiny.VOCABULARY])
    torch.testing.assert_close(found.double(), definition(student, teacher, batch, True)[0], rtol=1e-6, atol=1e-9)


def test_a_student_of_half_the_blocks_learns():
    teacher = tiny.llama(num_hidden_layers=4)
    student = drop_layers(teacher)
    wrapper = DistillWrapper(student, teacher, hidden="squarehead", hidden_weight=0.1).train()
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=3e-3)
    first = last = None
    for _ in range(30):
        found = wrapper(input_ids=tiny.token_ids())
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        first, last = first or float(found["divergence"]), float(found["divergence"])
    assert last < 0.2 * first
