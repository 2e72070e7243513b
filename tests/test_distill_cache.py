"""TeacherCache holds what the teacher predicts, whoever killed its writer, and no other is taken for it."""

import collections
import json
import shutil

import pytest
import tiny
import torch
from scripts import said_by
from torch import nn

from llmkern.distill import DistillWrapper, TeacherCache, cache_writer
from llmkern.ops import linear_kl_div_topk

transformers = pytest.importorskip("transformers")

from distill_models import HEADS, batch_of, close, definition, gradients, pair  # noqa: E402

HALF = 2.0**-11  # relative rounding of fp16


def batches_of(kind="llama", count=5, **options):
    found = []
    for number in range(count):
        batch = batch_of(kind, length=7 + number, **options)
        batch["input_ids"] = tiny.token_ids(3, 7 + number, seed=10 + number)
        found.append(batch)
    return found


def written(path, teacher, batches, **options):
    return TeacherCache.write(path, teacher, batches, progress=False, **{"k": 5, **options})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "bert", "granite", "gemma2"])
def test_rows_are_the_likeliest_classes(kind, side, tmp_path):
    teacher, batches = HEADS[kind](), batches_of(kind, side=side)
    cache = written(tmp_path / "c", teacher, batches, temperature=1.5, shard_mb=0.001)
    assert len(cache._parts) > 2
    assert (cache.k, cache.temperature, cache.sampled, cache.classes) == (5, 1.5, False, tiny.VOCABULARY)
    assert (len(cache), cache.batches) == (15, 5)
    for batch in reversed(batches):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            wanted = (teacher(**inputs).logits.float() / 1.5).log_softmax(-1)
        counted = batch["attention_mask"].bool() & (tiny.token_ids(*batch["input_ids"].shape, seed=4) % 3 > 0)
        indices, log_probs = cache.rows(batch, counted)
        assert (indices.dtype, log_probs.dtype) == (torch.int32, torch.float16)
        assert indices.shape == log_probs.shape == (int(counted.sum()), 5)
        top = wanted[counted].topk(5).values
        torch.testing.assert_close(log_probs.float(), top, rtol=2 * HALF, atol=1e-5)
        torch.testing.assert_close(wanted[counted].gather(1, indices.long()), top, rtol=1e-5, atol=1e-5)


def test_batches_and_sequences_come_back_as_they_were_written(tmp_path):
    batches = [batch_of("llama", "left"), batch_of("llama", "right"), {"input_ids": tiny.token_ids(1, 4, seed=7)}]
    cache = written(tmp_path / "c", tiny.llama(), batches)
    for number, batch in enumerate(batches):
        found = cache.batch(number)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        length = int(mask.sum(0).nonzero().max()) + 1
        assert torch.equal(found["attention_mask"], mask[:, :length])
        assert torch.equal(found["input_ids"], (batch["input_ids"] * mask)[:, :length])
        assert found["indices"].shape == found["log_probs"].shape == (*found["input_ids"].shape, 5)
        rows = cache.rows(batch, mask.bool())
        assert torch.equal(found["indices"][found["attention_mask"].bool()], rows[0])
        assert torch.equal(found["log_probs"][found["attention_mask"].bool()], rows[1])
    assert cache[6].input_ids.tolist() == batches[2]["input_ids"][0].tolist()
    for bad in (lambda: cache.batch(3), lambda: cache.batch(-1), lambda: cache[7]):
        with pytest.raises(IndexError):
            bad()


def test_right_padding_is_free_and_all_else_is_part_of_a_sequence(tmp_path):
    batch = batch_of("llama", "left")
    cache = written(tmp_path / "c", tiny.llama(), [batch])
    wider = {key: nn.functional.pad(batch[key], (0, 3)) for key in ("input_ids", "attention_mask")}
    counted = wider["attention_mask"].bool()
    for found, wanted in zip(
        cache.rows(wider, counted), cache.rows(batch, batch["attention_mask"].bool()), strict=True
    ):
        assert torch.equal(found, wanted)
    junk = {**wider, "input_ids": wider["input_ids"] + (1 - wider["attention_mask"])}
    cache.rows(junk, counted)  # what stands on padding is not seen
    for other in (
        {key: nn.functional.pad(batch[key], (1, 0)) for key in ("input_ids", "attention_mask")},
        {**batch, "input_ids": batch["input_ids"].flip(1)},
        {**batch, "position_ids": batch["attention_mask"].cumsum(1)},
        {key: value[:, :-1] for key, value in batch.items()},
    ):
        with pytest.raises(ValueError, match="it does not hold sequence 0 of the batch"):
            cache.rows(other, torch.ones_like(other["input_ids"], dtype=torch.bool))
    with pytest.raises(ValueError, match="position_ids of a batch must be"):
        cache.rows({**batch, "position_ids": torch.arange(9)}, batch["attention_mask"].bool())


def test_other_inputs_go_to_the_teacher(tmp_path):
    batch, teacher = batch_of("bert"), tiny.bert()
    kinds = [torch.zeros_like(batch["input_ids"]), torch.ones_like(batch["input_ids"])]
    both = [{**batch, "token_type_ids": kind} for kind in kinds]
    cache = written(tmp_path / "c", teacher, both)
    first, second = (cache.rows(one, one["attention_mask"].bool())[1] for one in both)
    assert not torch.equal(first, second)


def test_chunks_of_logits_change_nothing_and_hold_little(tmp_path, monkeypatch):
    teacher, batches = tiny.llama(), batches_of()
    whole = written(tmp_path / "whole", teacher, batches)
    sizes = []
    logits = cache_writer.OutputHead.logits
    monkeypatch.setattr(cache_writer, "WORKSPACE", 3 * 3 * 4 * tiny.VOCABULARY)
    monkeypatch.setattr(
        cache_writer.OutputHead,
        "logits",
        lambda self, hidden, *more: sizes.append(len(hidden)) or logits(self, hidden, *more),
    )
    chunks = written(tmp_path / "chunks", teacher, batches)
    assert max(sizes) == 3
    assert all(
        torch.equal(a, b) for at in range(len(whole)) for a, b in zip(whole[at][:2], chunks[at][:2], strict=True)
    )


@pytest.mark.parametrize("kind", ["llama", "bert", "phi", "gemma2"])
def test_a_cache_of_all_classes_gives_the_teachers_loss(kind, tmp_path):
    student, teacher = pair(kind, torch.float32)
    batch = batch_of(kind)
    cache = written(tmp_path / "c", teacher, [batch], k=tiny.VOCABULARY, temperature=2.0)
    options = {"temperature": 2.0, "ce_weight": 0.4}
    found = DistillWrapper(student, cache, **options)(**batch)
    wanted = definition(student, teacher, batch, kind != "bert", **options)
    for name, value in zip(("loss", "divergence", "cross_entropy", "agreement"), wanted, strict=True):
        torch.testing.assert_close(found[name], value, rtol=5e-3, atol=2e-3)
    assert close(gradients(student, found["loss"]), gradients(student, wanted[0]), 5e-3)


@pytest.mark.parametrize("sample", [False, True])
def test_what_the_cache_leaves_out_is_the_tail_or_was_drawn(sample, tmp_path):
    student, teacher = pair("llama", torch.float32)
    batch = batch_of("llama")
    cache = written(tmp_path / "c", teacher, [batch], k=7, sample=sample)
    found = DistillWrapper(student, cache)(**batch)["loss"]
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    counted = (labels != -100) & batch["attention_mask"].bool()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = student.model(**inputs).last_hidden_state[counted]
    options = [
        linear_kl_div_topk(hidden, student.lm_head.weight, *cache.rows(batch, counted), tail=tail).loss
        for tail in (True, False)
    ]
    torch.testing.assert_close(found, options[sample])
    assert not torch.isclose(found, options[not sample])


def test_fewer_classes_than_the_teachers(tmp_path):
    student, teacher = tiny.llama(vocab_size=tiny.VOCABULARY), tiny.llama(vocab_size=tiny.VOCABULARY + 20)
    batch = batch_of("llama")
    whole = written(tmp_path / "whole", teacher, [batch])
    with pytest.raises(ValueError, match="give tokenizers"):
        DistillWrapper(student, whole)
    with pytest.raises(
        ValueError, match="the cache has 116 classes, more than the student's 96; write it with classes=96"
    ):
        DistillWrapper(student, whole, shared_prefix=True)
    cache = written(tmp_path / "c", teacher, [batch], k=96, classes=96)
    with torch.no_grad():
        wanted = teacher(batch["input_ids"][:1]).logits[0, :, :96].log_softmax(-1)
    _, log_probs = cache.rows({"input_ids": batch["input_ids"][:1]}, torch.ones(1, 9, dtype=torch.bool))
    torch.testing.assert_close(log_probs.float(), wanted.sort(descending=True).values, rtol=2 * HALF, atol=1e-4)
    assert torch.isfinite(DistillWrapper(student, cache)(**batch)["loss"])


def test_a_part_of_a_batch_without_labels_that_count(tmp_path):
    teacher, batch = tiny.llama(), batch_of("llama")
    wrapper = DistillWrapper(tiny.llama(num_hidden_layers=1), written(tmp_path / "c", teacher, [batch]))
    found = wrapper(**{**batch, "labels": torch.full_like(batch["labels"], -100)}, num_items_in_batch=5)
    found["loss"].backward()
    assert found["loss"] == 0


# --- draws ----------------------------------------------------------------------------------------------------------


def test_counted_counts_draws(generator):
    for rows, k, classes in ((1, 1, 3), (20, 7, 4), (9, 30, 1000), (5, 16, 2)):
        draws = torch.randint(0, classes, (rows, k), generator=generator)
        indices, log_probs = cache_writer.counted(draws)
        assert (indices.dtype, log_probs.dtype, indices.shape) == (torch.int32, torch.float16, (rows, k))
        for row in range(rows):
            wanted = collections.Counter(draws[row].tolist())
            listed = log_probs[row] > -torch.inf
            found = {
                int(c): float(p.float().exp())
                for c, p in zip(indices[row][listed], log_probs[row][listed], strict=True)
            }
            assert found.keys() == wanted.keys()
            assert len(found) == int(listed.sum())
            assert all(found[c] == pytest.approx(count / k, rel=4e-3) for c, count in wanted.items())
            assert log_probs[row].tolist() == sorted(log_probs[row].tolist(), reverse=True)
            assert (indices[row][~listed] == indices[row][0]).all()


def test_the_mean_over_draws_is_the_teachers_distribution_and_its_gradient(generator):
    classes, k, rows = 12, 4, 40_000
    logits = 2 * torch.randn(classes, generator=generator)
    p, q = logits.softmax(-1), torch.randn(classes, generator=generator).softmax(-1)
    settings = cache_writer.Settings(k, 1.0, True, 0, None, 1.0)
    indices, log_probs = cache_writer._predictions(logits.expand(rows, -1), settings, generator)
    shares = torch.zeros(rows, classes).scatter_add_(1, indices.long(), log_probs.float().exp())
    deviation = (p * (1 - p) / (k * rows)).sqrt()
    assert ((shares.mean(0) - p).abs() <= 5 * deviation + 1e-4).all()
    # The gradient in the student's logits is that of the whole distribution, q - p; that of the likeliest k is not.
    hidden = q.log().expand(rows, -1).clone().requires_grad_()
    linear_kl_div_topk(hidden, torch.eye(classes), indices, log_probs, tail=False).loss.backward()
    found = hidden.grad.sum(0)
    assert ((found - (q - p)).abs() <= 5 * deviation + 2e-4).all()
    top, likeliest = logits.log_softmax(-1)[None].topk(k)
    biased = q.log()[None].clone().requires_grad_()
    linear_kl_div_topk(biased, torch.eye(classes), likeliest, top, tail=False).loss.backward()
    assert (biased.grad[0] - (q - p)).abs().max() > 0.02


def test_draws_are_at_the_temperature_and_of_the_seed(tmp_path):
    teacher, batches = tiny.llama(), batches_of(count=2)
    caches = [
        written(tmp_path / f"{at}", teacher, batches, sample=True, k=64, seed=seed, temperature=t)
        for at, (seed, t) in enumerate(((0, 1.0), (0, 1.0), (1, 1.0), (0, 9.0)))
    ]
    draws = [cache.batch(0) for cache in caches]
    assert torch.equal(draws[0]["indices"], draws[1]["indices"])
    assert not torch.equal(draws[0]["indices"], draws[2]["indices"])
    different = [float((one["log_probs"] > -torch.inf).float().mean()) for one in draws]
    assert different[3] > 1.1 * different[0]  # a flatter distribution, more classes


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_cache_of_another_run_is_refused(tmp_path):
    teacher, batches = tiny.llama(), batches_of()
    written(tmp_path / "c", teacher, batches)
    other = tiny.llama()
    with torch.no_grad():
        other.lm_head.weight[3, 4] += 1
    cases = (
        (other, batches, {}, "teacher.values"), (tiny.gpt2(), batches, {}, "teacher.class"),
        (teacher, batches[:-1], {}, "data"), (teacher, batches, {"k": 6}, "settings.k is 5 there and 6 here"),
        (teacher, batches, {"temperature": 2.0}, "settings.temperature"),
        (teacher, batches, {"sample": True}, "settings.sample"),
    )  # fmt: skip
    for model, data, options, part in cases:
        with pytest.raises(ValueError, match=f"of another run: .*{part}"):
            written(tmp_path / "c", model, data, **options)
    again = written(tmp_path / "c", teacher, batches)
    assert len(again) == 15


def damaged(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_cache_is_refused(tmp_path):
    teacher, batches = tiny.llama(), batches_of()
    written(tmp_path / "c", teacher, batches, shard_mb=0.001)
    rows = {"batch": batches[0], "counted": batches[0]["attention_mask"].bool()}

    def copy(name):
        shutil.copytree(tmp_path / "c", tmp_path / name)
        return tmp_path / name

    damaged(copy("bit") / "0000.safetensors")
    with pytest.raises(ValueError, match=r"TeacherCache .*0000.safetensors \(shard 0\) is damaged"):
        TeacherCache.open(tmp_path / "bit").rows(**rows)
    with pytest.raises(ValueError, match="is damaged"):
        written(tmp_path / "bit", teacher, batches, shard_mb=0.001)
    short = copy("short") / "0001.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"0001\.safetensors must have"):
        TeacherCache.open(short.parent)
    (copy("gone") / "0001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"0001\.safetensors must have .* bytes, got no such file"):
        TeacherCache.open(tmp_path / "gone")
    assert len(written(tmp_path / "gone", teacher, batches, shard_mb=0.001)) == 15  # what is gone is written again
    (copy("manifest") / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"TeacherCache .*state\.json is damaged"):
        TeacherCache.open(tmp_path / "manifest")
    part = copy("part") / "state.json"
    manifest = json.loads(part.read_text())
    part.write_text(json.dumps({**manifest, "parts": manifest["parts"][:1]}))
    with pytest.raises(ValueError, match=r"only 1 of .* shards are written"):
        TeacherCache.open(part.parent)
    part.write_text(json.dumps({**manifest, "fingerprint": {}}))
    with pytest.raises(ValueError, match="of another kind of run"):
        TeacherCache.open(part.parent)
    with pytest.raises(FileNotFoundError, match=r"holds no state.json"):
        TeacherCache.open(tmp_path / "nothing")


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"TeacherCache .*holds notes\.txt"):
        written(tmp_path, tiny.llama(), batches_of())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("batches", "options", "part"),
    [
        ([], {}, "at least one batch, got none"),
        (torch.zeros(0, 5, dtype=torch.int64), {}, "at least one batch"),
        ([tiny.token_ids(2, 3)[:0]], {}, "must be integers"),
        ([torch.zeros(2, 3)], {}, "must be integers"),
        ([tiny.token_ids(2, 3) + 95], {}, r"must be in \[0, 96\)"),
        (
            [{"input_ids": tiny.token_ids(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}],
            {},
            "a token in each sequence",
        ),
        ([{"input_ids": tiny.token_ids(2, 3), "attention_mask": torch.ones(2, 4)}], {}, "attention_mask must be"),
        (tiny.token_ids(2), {"k": 0}, "k must be 1 to 96"),
        (tiny.token_ids(2), {"k": 97}, "k must be 1 to 96"),
        (tiny.token_ids(2), {"temperature": 0.0}, "temperature must be a positive"),
        (tiny.token_ids(2), {"shard_mb": 0}, "shard_mb must be positive"),
        (tiny.token_ids(2), {"classes": 97}, "classes must be 1 to 96"),
    ],
)
def test_arguments_that_make_no_sense(batches, options, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        written(tmp_path / "c", tiny.llama(), batches, **options)
    assert not (tmp_path / "c").exists()


def test_batches_of_another_kind(tmp_path):
    for batches in (7, [{"labels": tiny.token_ids(2)}], ["text"]):
        with pytest.raises(TypeError, match="TeacherCache: "):
            written(tmp_path / "c", tiny.llama(), batches)


def test_a_cache_serves_one_temperature_and_forward_kl(tmp_path):
    cache = written(tmp_path / "c", tiny.llama(), batches_of())
    cases = (
        ({"temperature": 2.0}, "temperature must be the cache's, 1.0, got 2.0"),
        ({"kind": "reverse_kl"}, 'the kind must be "forward_kl"'), ({"hidden": "cosine"}, "needs the teacher itself"),
    )  # fmt: skip
    for options, part in cases:
        with pytest.raises(ValueError, match=part):
            DistillWrapper(tiny.llama(), cache, **options)


def test_killed_writers_leave_what_the_next_one_finishes(tmp_path):
    said = said_by("killed_distill.py", "cache", tmp_path)
    assert said["different"] == []
    assert len(set(said["parts"])) > 3  # they died at many places
