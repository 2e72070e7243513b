"""Tiny students and teachers whose heads differ in all that heads differ in, and the loss by its definition."""

import tiny
import torch
import transformers

SMALL = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def granite(**changes):
    """Logits divided by a number."""
    return tiny._build(
        transformers.GraniteForCausalLM,
        transformers.GraniteConfig(**{**SMALL, "num_hidden_layers": 2, "logits_scaling": 3.0, **changes}),
    )


def cohere(**changes):
    """Logits times a number."""
    return tiny._build(
        transformers.CohereForCausalLM,
        transformers.CohereConfig(**{**SMALL, "num_hidden_layers": 2, "logit_scale": 0.25, **changes}),
    )


def gemma2(**changes):
    """Logits softly capped."""
    sizes = {**SMALL, "num_hidden_layers": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
    return tiny._build(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**{**sizes, **changes}))


def phi(**changes):
    """A head with a bias."""
    return tiny._build(
        transformers.PhiForCausalLM, transformers.PhiConfig(**{**SMALL, "num_hidden_layers": 2, **changes})
    )


def distilbert(**changes):
    sizes = {
        "vocab_size": tiny.VOCABULARY,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
    }
    return tiny._build(transformers.DistilBertForMaskedLM, transformers.DistilBertConfig(**{**sizes, **changes}))


def tied(**changes):
    return tiny.llama(tie_word_embeddings=True, **changes)


DECODERS = {
    "llama": tiny.llama, "tied": tied, "gpt2": tiny.gpt2, "opt": tiny.opt, "gemma3": tiny.gemma3, "granite": granite,
    "cohere": cohere, "gemma2": gemma2, "phi": phi,
}  # fmt: skip
ENCODERS = {"bert": tiny.bert, "distilbert": distilbert}
HEADS = DECODERS | ENCODERS


def pair(kind, dtype=torch.float64):
    """A teacher, and a student that is not it."""
    teacher, student = HEADS[kind]().to(dtype), HEADS[kind]().to(dtype)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return student, teacher


def batch_of(kind, side="right", n=3, length=9):
    """Token ids with padding on a side, and labels of which some are ignored."""
    ids = tiny.token_ids(n, length, seed=1)
    mask = torch.ones_like(ids)
    for row in range(1, n):
        mask[row, slice(length - 2 * row, None) if side == "right" else slice(0, 2 * row)] = 0
    labels = ids.clone() if kind in DECODERS else tiny.token_ids(n, length, seed=2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels.masked_fill(tiny.token_ids(n, length, seed=3) % 4 == 0, -100),
    }


def definition(student, teacher, batch, causal, *, temperature=1.0, ce_weight=0.0, t2_scale=True, items=None):
    """loss, divergence, cross-entropy, agreement: forward KL from the models' own logits, row by row."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    mine, theirs = (model(**inputs).logits for model in (student, teacher))
    rows = []
    n, length = batch["input_ids"].shape
    for b in range(n):
        for t in range(length):
            target = t + 1 if causal else t
            if target >= length or batch["labels"][b, target] == -100 or not batch["attention_mask"][b, t]:
                continue
            p = (theirs[b, t].detach() / temperature).softmax(-1)
            lq = (mine[b, t] / temperature).log_softmax(-1)
            ce = -mine[b, t].log_softmax(-1)[batch["labels"][b, target]]
            rows.append(
                torch.stack(
                    ((p * (p.log() - lq)).sum(), ce, (mine[b, t].argmax() == theirs[b, t].argmax()).to(ce.dtype))
                )
            )
    kl, ce, agree = torch.stack(rows).sum(0)
    count = items or len(rows)
    loss = ((temperature**2 if t2_scale else 1) * kl + ce_weight * ce) / count
    return loss, kl / count, ce / count, agree / len(rows)


def gradients(model, loss):
    """By parameter name; zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def close(found, wanted, tolerance=1e-6):
    """Whether gradients by name agree, relative to the largest."""
    scale = max(float(value.abs().max()) for value in wanted.values())
    return found.keys() == wanted.keys() and all(
        (found[name] - wanted[name]).abs().max() <= tolerance * scale for name in wanted
    )
