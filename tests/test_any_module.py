"""compress on modules that are no language models of transformers: extra inputs, keywords, images, shared layers."""

import pytest
import tiny
import torch
from torch import nn

import llmkern
from llmkern import patching
from llmkern.nn import PackedLinear
from llmkern.solvers import rtn


def compress(model, calibration, recipe="gptq-int8", **fields):
    return llmkern.compress(model.eval(), llmkern.Recipe.parse(recipe, **fields), calibration, progress=False)


class Block(nn.Module):
    """A hidden state, a condition by position, and two tensors by keyword."""

    def __init__(self):
        super().__init__()
        self.q, self.o, self.d = (nn.Linear(16, 16) for _ in range(3))

    def inputs(self, h, cond, *, scale, pos):
        """What q, o and d read."""
        o = torch.tanh(self.q(h) + cond)
        return h, o, torch.tanh(self.o(o) * scale) + pos

    def forward(self, h, cond, *, scale, pos=None):
        return h + self.d(self.inputs(h, cond, scale=scale, pos=pos)[-1])


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(16, 4)

    def extra(self, t, pos):
        return (t[:, None],), {"scale": t.mean(1)[:, None, None], "pos": pos}

    def forward(self, h, t, *, pos):
        args, kwargs = self.extra(t, pos)
        for block in self.blocks:
            h = block(h, *args, **kwargs)
        return self.out(h)


def test_blocks_with_extra_inputs_are_fed_with_them(monkeypatch):
    """Every call has a condition of its own, so a block run with another call's would have another Hessian."""
    seen = {}

    def solve(weight, hessian, recipe, *others):
        seen[weight.data_ptr()] = hessian.raw().clone()
        return rtn(weight, None, bits=4, group_size=16)

    monkeypatch.setattr(patching, "solve", solve)
    model, twin = Conditioned(), Conditioned()
    pointers = {name: m.weight.data_ptr() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    calls = [(torch.randn(2, 5, 16), torch.randn(2, 16), torch.randn(5, 16)) for _ in range(3)]
    report = compress(model, lambda m: [m(h, t, pos=pos) for h, t, pos in calls], "gptq-int4-g16", objective="layer")
    assert report.tokens == 30
    assert [row.name for row in report.rows if any("outside the repeated" in note for note in row.notes)] == ["out"]
    hidden = [h for h, _, _ in calls]
    extra = [twin.extra(t, pos) for _, t, pos in calls]
    with torch.no_grad():
        for at, block in enumerate(twin.blocks):
            for place, name in enumerate("qod"):
                inputs = [block.inputs(h, *a, **k)[place] for h, (a, k) in zip(hidden, extra, strict=True)]
                x = torch.cat(inputs).reshape(-1, 16)
                torch.testing.assert_close(seen[pointers[f"blocks.{at}.{name}"]], x.T @ x, rtol=1e-4, atol=1e-4)
                weight = block.get_submodule(name).weight
                weight.copy_(rtn(weight, None, bits=4, group_size=16).weight)
            hidden = [block(h, *a, **k) for h, (a, k) in zip(hidden, extra, strict=True)]


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 32), nn.Linear(32, 10)

    def forward(self, image):
        return self.b(torch.relu(self.a(torch.relu(self.conv(image)).flatten(1))))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, *, left, right):
        return self.b(torch.tanh(self.a(left) + right))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha, self.a = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.a(self.mha(x, x, x)[0])


CASES = {
    "mlp": (tiny.mlp, lambda: {"input": torch.randn(40, 32)}, {"0", "2"}),
    "one feature": (
        lambda: nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1)), lambda: {"input": torch.randn(9, 1)}, {"0", "1"}
    ),
    "vision": (Vision, lambda: {"image": torch.randn(40, 3, 8, 8)}, {"a", "b"}),
    "keywords": (Keywords, lambda: {"left": torch.randn(40, 16), "right": torch.randn(40, 16)}, {"a", "b"}),
    "attention": (Attention, lambda: {"x": torch.randn(4, 10, 16)}, {"a"}),
    "torch's transformer": (
        lambda: nn.Transformer(16, 2, 1, 2, 32, batch_first=True),
        lambda: {"src": torch.randn(4, 10, 16), "tgt": torch.randn(4, 6, 16)},
        {
            f"{layer}.linear{at}"
            for layer in ("encoder.layers.0", "decoder.layers.0", "decoder.layers.1") for at in (1, 2)
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("as_batches", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_any_module_with_a_callable_or_batches(case, as_batches):
    build, make, names = CASES[case]
    torch.manual_seed(0)
    model, inputs = build().eval(), make()
    with torch.no_grad():
        before = model(**inputs)
    report = compress(model, [inputs] if as_batches else lambda m: m(**inputs))
    assert {row.name for row in report.rows} == names
    assert {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)} == names
    with torch.no_grad():
        after = model(**inputs)
    assert 0 < (after - before).norm() < 0.02 * before.norm()
    assert all(skip.reason for skip in report.skipped)


class Twice(nn.Module):
    """One layer under two names, run twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b = self.a

    def forward(self, x):
        return self.c(self.b(torch.tanh(self.a(x))))


@pytest.mark.parametrize("target", ["a", "b"])
def test_a_layer_with_two_names_learns_from_both_uses(target):
    model, x = Twice(), torch.randn(40, 16)
    report = compress(model, [x], targets=[target])
    (row,) = report.rows
    assert (row.name, row.tokens) == ("a", 80)
    assert "the same module is also b, replaced with it" in row.notes
    assert model.a is model.b
    assert isinstance(model.a, PackedLinear)
    assert [skip.name for skip in report.skipped] == ["c"]


def test_a_float_tensor_is_no_token_ids():
    with pytest.raises(TypeError, match=r"got torch.float32 \(other inputs: a list of batches, or a callable"):
        compress(tiny.mlp(), torch.randn(40, 32))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "t5"])
def test_a_tied_head_on_request_leaves_the_embeddings_alone(kind):
    model = tiny.MODELS[kind](**({"tie_word_embeddings": True} if kind == "llama" else {}))
    ids = tiny.token_ids(11)
    before, dense = tiny.output(kind, model, ids), model.get_input_embeddings().weight.clone()
    calibration = [tiny.inputs(kind, part) for part in ids.split(4)]
    report = compress(model, calibration, ignore=())
    packed = model.get_output_embeddings()
    assert isinstance(packed, PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, dense)
    row = next(row for row in report.rows if model.get_submodule(row.name) is packed)
    assert row.tokens == ids.numel()
    assert any(note.startswith("its weight was tied to that of ") for note in row.notes)
    assert 0 < (tiny.output(kind, model, ids) - before).norm() < 0.05 * before.norm()


def test_a_tied_head_stays_without_a_request():
    model = tiny.llama(tie_word_embeddings=True)
    report = compress(model, tiny.token_ids())
    assert {skip.name: skip.reason for skip in report.skipped} == {"lm_head": "ignored by 'lm_head'"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
