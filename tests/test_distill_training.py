"""A wrapped student in the loops of others (Trainer, accelerate, FSDP2), and in the command's own, also killed."""

import copy
import json

import pytest
import tiny
import torch
from scripts import said_by

from llmkern.distill import DistillWrapper, TeacherCache, drop_layers
from llmkern.distill.training import Settings, rate_at, train, windows_at
from llmkern.prune import MaskSet, magnitude_

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from distill_models import HEADS  # noqa: E402

IDS = tiny.token_ids(12)


def examples():
    """More labels are ignored from row to row."""
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in IDS]
    for number, row in enumerate(rows):
        row["labels"][:number] = -100
    return rows


def trainer(wrapper, out, **options):
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": [], "use_cpu": True,
        "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant", "max_grad_norm": 0,
        "optim": "sgd",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(out), **{**defaults, **options})
    return transformers.Trainer(wrapper, arguments, train_dataset=examples(), eval_dataset=examples())


def same(one, other):
    """Whether two models have the same parameters, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def made(kind="llama", **options):
    teacher = HEADS[kind]()
    return DistillWrapper(drop_layers(teacher), teacher, ce_weight=0.5, **options)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_the_stock_trainer_trains_saves_and_resumes(kind, tmp_path):
    wrapper = made(kind, hidden="squarehead")
    before = copy.deepcopy(wrapper.student)
    run = trainer(wrapper, tmp_path, learning_rate=1e-2)
    loss = run.evaluate()["eval_loss"]
    run.train()
    assert not same(before, wrapper.student)
    assert run.evaluate()["eval_loss"] < loss
    run.save_model(tmp_path / "out")
    for folder in ("out", "checkpoint-4"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is type(wrapper.student)
        assert same(loaded, wrapper.student)
        assert torch.equal(loaded(IDS).logits, wrapper.student.eval()(IDS).logits)
    again = made(kind, hidden="squarehead")
    trainer(again, tmp_path, learning_rate=1e-2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(again, wrapper)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"activation_checkpointing": True}])
def test_trainer_takes_the_steps_that_a_plain_loop_takes(options, tmp_path):
    """SGD without a schedule: with accumulation a step is one over all rows of its parts."""
    wrapper, plain = made(), made()
    accumulated = options.get("gradient_accumulation_steps", 1)
    run = trainer(wrapper, tmp_path, max_steps=2, save_strategy="no", **options)
    seen = []
    wrapper.register_forward_pre_hook(lambda module, args, batch: seen.append(batch), with_kwargs=True)
    run.train()
    assert len(seen) == 2 * accumulated
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    plain.train()
    for step in range(2):
        optimizer.zero_grad()
        parts = seen[step * accumulated : (step + 1) * accumulated]
        plain(**{name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")})[
            "loss"
        ].backward()
        optimizer.step()
    for (name, found), wanted in zip(wrapper.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_trainer_of_a_masked_model_and_of_a_cache(tmp_path):
    teacher = tiny.bert()
    masked = DistillWrapper(drop_layers(teacher), teacher, hidden="cosine")
    trainer(masked, tmp_path / "bert").train()
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert" / "checkpoint-4")
    assert same(loaded, masked.student)
    teacher = tiny.llama()
    cache = TeacherCache.write(tmp_path / "cache", teacher, IDS, k=8, progress=False)
    run = trainer(
        DistillWrapper(drop_layers(teacher), cache), tmp_path / "cached"
    )  # in the order that Trainer shuffles
    run.train()
    assert len(run.state.log_history) > 4


def test_accelerate_trains_and_gives_the_student_back():
    from accelerate import Accelerator

    wrapper, plain = made(), made()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(wrapper, optimizer)
    accelerator.backward(model(input_ids=IDS)["loss"])
    optimizer.step()
    other = torch.optim.SGD(plain.parameters(), lr=1e-2)
    plain(input_ids=IDS)["loss"].backward()
    other.step()
    assert same(accelerator.unwrap_model(model).student, plain.student)
    assert accelerator.get_state_dict(model).keys() == plain.state_dict().keys()


def test_two_ranks_with_sharded_parameters_take_the_step_of_one(tmp_path):
    said = said_by("distill_ranks.py", tmp_path)
    assert said["fsdp"] == said["ddp"] == [True, True]
    assert all("shard its blocks and then the wrapper" in error for error in said["head"])


# --- the command's loop ---------------------------------------------------------------------------------------------


def test_windows_are_all_taken_before_one_is_taken_again():
    settings = Settings(steps=10, batch=3, seed=1)
    taken = torch.cat([windows_at(step, 5, settings) for step in range(10)]).tolist()
    epochs = [taken[at : at + 5] for at in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert taken != torch.cat([windows_at(step, 5, Settings(steps=10, batch=3, seed=2)) for step in range(10)]).tolist()


def test_the_rate_rises_and_falls():
    settings = Settings(steps=100, rate=2.0, warmup=0.1)
    rates = [rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(2.0 * 0.55)
    assert 0.2 <= rates[-1] < 0.21
    assert rate_at(0, Settings(steps=1)) == pytest.approx(1e-4)


def test_the_loop_is_adamw_with_that_rate_and_clipping():
    wrapper, plain = made(), made()
    settings = Settings(4, 3, 1e-2, clip=0.5, weight_decay=0.1, seed=7)
    history = train(wrapper, IDS, settings, progress=False)
    assert not wrapper.training
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = rate_at(step, settings)
        loss = plain(input_ids=IDS[windows_at(step, 12, settings)])["loss"]
        assert history[step]["loss"] == pytest.approx(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in plain.parameters()]))
        assert norm > 0.5
        for parameter in plain.parameters():
            parameter.grad *= 0.5 / norm
        optimizer.step()
    for found, wanted in zip(wrapper.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_masks_hold_and_bf16_keeps_parameters_in_fp32():
    teacher = tiny.llama()
    student = copy.deepcopy(teacher)
    magnitude_(student, "2:4")
    masks = MaskSet.from_model(student)
    wrapper = DistillWrapper(student, teacher)
    history = train(wrapper, IDS, Settings(20, 3, 1e-3, dtype="bfloat16"), masks=masks, progress=False)
    masks.check("2:4")
    assert student.dtype == torch.float32
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    student.zero_grad()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    wrapper(input_ids=IDS)["loss"].backward()
    optimizer.step()
    with pytest.raises(ValueError, match="not 0"):
        masks.check()  # the loop let go of them


def test_a_state_of_another_run_is_refused(tmp_path):
    settings = Settings(4, 2)
    train(made(), IDS, settings, state_dir=tmp_path / "s", save_seconds=0, progress=False)
    assert (tmp_path / "s" / "state.json").exists()
    cases = (
        (made("tied"), IDS, settings, "student.values"), (made(), IDS[1:], settings, "windows"),
        (made(), IDS, Settings(5, 2), "settings.steps is 4 there and 5 here"),
        (made(temperature=2.0), IDS, settings, "loss.temperature"),
        (made(hidden="cosine"), IDS, settings, "loss.hidden"),
    )  # fmt: skip
    for wrapper, windows, asked, part in cases:
        with pytest.raises(ValueError, match=f"distill .*of another run: .*{part}"):
            train(wrapper, windows, asked, state_dir=tmp_path / "s", progress=False)
    done = train(made(), IDS, settings, state_dir=tmp_path / "s", progress=False)
    assert len(done) == 4


def test_killed_runs_end_with_the_same_bits(tmp_path):
    said = said_by("killed_distill.py", "train", tmp_path)
    assert said["different"] == []
    assert len(set(said["parts"])) > 3


def test_a_run_keeps_its_last_step_alone(tmp_path):
    train(made(), IDS, Settings(5, 2), state_dir=tmp_path / "s", save_seconds=0, progress=False)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["0003.safetensors", "lock", "state.json"]
    assert [part["name"] for part in json.loads((tmp_path / "s" / "state.json").read_text())["parts"]] == ["step 4"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"steps": 0}, "steps must be at least 1"), ({"steps": 1, "batch": 0}, "batch must be at least 1"),
        ({"steps": 1, "rate": 0.0}, "rate must be a positive"), ({"steps": 1, "rate": float("nan")}, "rate must be"),
        ({"steps": 1, "clip": float("inf")}, "clip must be"), ({"steps": 1, "warmup": 1.0}, "warmup must be a share"),
        ({"steps": 1, "dtype": "float16"}, "dtype must be one of float32, bfloat16"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(options, part):
    with pytest.raises(ValueError, match=part):
        Settings(**options)


def test_windows_and_losses_that_make_no_sense(tmp_path):
    for windows in (IDS[:0], IDS[0]):
        with pytest.raises(ValueError, match="windows must be token ids"):
            train(made(), windows, Settings(1), progress=False)
    wrapper = made()
    with torch.no_grad():
        wrapper.student.lm_head.weight[0, 0] = float("inf")
    wrapper._verified = True
    with pytest.raises(FloatingPointError, match="loss of step 0 is nan"):
        train(wrapper, IDS, Settings(1), state_dir=tmp_path / "s", progress=False)
    assert not (tmp_path / "s").exists()
