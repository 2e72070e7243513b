"""What DistillWrapper and check_tokenizers refuse: settings, models, batches and tokenizers that do not fit."""

import pytest
import tiny
import torch

from llmkern.distill import DistillWrapper, check_tokenizers

transformers = pytest.importorskip("transformers")

from distill_models import batch_of, pair  # noqa: E402


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"temperature": -1.0}, "temperature must be a positive"),
        ({"temperature": float("nan")}, "temperature must be a positive"),
        ({"ce_weight": -0.1}, "ce_weight must be 0 or a positive"),
        ({"hidden_weight": float("inf")}, "hidden_weight must be"),
        ({"kind": "forward"}, "kind must be one of forward_kl"),
        ({"hidden": "mse"}, "hidden must be None or one of cosine, squarehead"),
        ({"hidden": "cosine", "layers": []}, "at least one pair"),
        ({"hidden": "cosine", "layers": [(0, 3)]}, r"pairs of blocks below \(3, 3\), got \(0, 3\)"),
        ({"hidden": "cosine", "layers": [(-1, 0)]}, "pairs of blocks below"),
    ],
)
def test_settings_that_make_no_sense(options, part):
    with pytest.raises(ValueError, match=part):
        DistillWrapper(tiny.llama(), tiny.llama(), **options)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="same model"):
        DistillWrapper(model := tiny.llama(), model)
    with pytest.raises(TypeError, match="student's output head must be a dense linear layer, got none"):
        DistillWrapper(tiny.mlp(), tiny.llama())
    with pytest.raises(ValueError, match=r"as wide as the teacher \(64\), got 32"):
        DistillWrapper(tiny.llama(hidden_size=32), tiny.llama(), hidden="squarehead")
    with pytest.raises(ValueError, match="student has 96 classes and the teacher 97; give tokenizers"):
        DistillWrapper(tiny.llama(), tiny.llama(vocab_size=97))
    sequences = transformers.LlamaForSequenceClassification(tiny.llama().config)
    with pytest.raises(TypeError, match="teacher's output head"):
        DistillWrapper(tiny.llama(), sequences)


def test_a_packed_head_is_refused():
    import llmkern

    teacher = tiny.llama()
    llmkern.patch(teacher, llmkern.Recipe.parse("rtn-int8", ignore=()))
    with pytest.raises(TypeError, match="got PackedLinear"):
        DistillWrapper(tiny.llama(), teacher)


class Doubled(transformers.LlamaForCausalLM):
    """Its logits are not those of its head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_more_than_a_linear_head_is_refused(role):
    models = {"student": tiny.llama(), "teacher": tiny.llama()}
    models[role] = Doubled(tiny.llama().config)
    wrapper = DistillWrapper(**models)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{role}'s logits must be those of its linear output head"):
            wrapper(**batch_of("llama"))


def test_the_order_of_tokens_must_be_as_it_is_said():
    encoder = transformers.BertLMHeadModel(tiny.bert().config).eval()
    with pytest.raises(ValueError, match="sees later tokens"):
        DistillWrapper(encoder, tiny.bert())(**batch_of("bert"))
    with pytest.raises(ValueError, match="sees no tokens after"):
        DistillWrapper(tiny.llama(), pair("llama", torch.float32)[0], causal=False)(**batch_of("llama"))

    class Other(transformers.LlamaForCausalLM.__mro__[1]):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = transformers.LlamaForCausalLM(config)
            self.forward = self.inner.forward

        def get_output_embeddings(self):
            return self.inner.lm_head

    with pytest.raises(ValueError, match="causal must be True or False for a Other"):
        DistillWrapper(Other(tiny.llama().config), tiny.llama())


def test_batches_that_make_no_sense():
    wrapper = DistillWrapper(*pair("llama", torch.float32))
    ids = tiny.token_ids(2, 6)
    for bad in (None, ids[:0], ids[:, :0], ids[0]):
        with pytest.raises(ValueError, match="must have input_ids"):
            wrapper(input_ids=bad)
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 6\]"):
        wrapper(input_ids=ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"labels must be \[2, 6\]"):
        wrapper(input_ids=ids, labels=ids[:, :-1])
    for nothing in ({"labels": torch.full_like(ids, -100)}, {"attention_mask": torch.zeros_like(ids)}):
        with pytest.raises(ValueError, match="must have a label that counts"):
            wrapper(input_ids=ids, **nothing)
    with pytest.raises(ValueError, match="must have a label that counts"):
        wrapper(input_ids=ids[:, :1])  # one token predicts nothing
    with pytest.raises(ValueError, match="needs labels"):
        DistillWrapper(*pair("bert", torch.float32), ce_weight=0.5)(input_ids=ids)


def tokenizer(words, merges=(), pattern="Whitespace"):
    import tokenizers

    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = getattr(tokenizers.pre_tokenizers, pattern)()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_tokenizers_that_differ_are_refused_by_the_first_token():
    one = tokenizer(["<unk>", "a", "b", "c"])
    check_tokenizers(one, tokenizer(["<unk>", "a", "b", "c"]))
    with pytest.raises(ValueError, match="token 2 is 'b' for the student and 'x' for the teacher"):
        check_tokenizers(one, tokenizer(["<unk>", "a", "x", "y"]))
    with pytest.raises(ValueError, match="token 4 is none for the student and 'd' for the teacher"):
        check_tokenizers(one, tokenizer(["<unk>", "a", "b", "c", "d"]))
    words = ["<unk>", "a", "The", "3rd", "café"]
    with pytest.raises(ValueError, match="cut text differently: token 2 of a sample is 'café'"):
        check_tokenizers(
            tokenizer([*words, "café:"], pattern="Whitespace"), tokenizer([*words, "café:"], pattern="WhitespaceSplit")
        )
    models = tiny.llama(), tiny.llama(vocab_size=99)
    with pytest.raises(ValueError, match="token 2 is"):
        DistillWrapper(*models, tokenizers=(one, tokenizer(["<unk>", "a", "x"])))
    assert torch.isfinite(DistillWrapper(*models, tokenizers=(one, one))(**batch_of("llama"))["loss"])
    with pytest.raises(ValueError, match="token 2 is"):  # heads of one size are no proof
        DistillWrapper(tiny.llama(), tiny.llama(), tokenizers=(one, tokenizer(["<unk>", "a", "x"])))
