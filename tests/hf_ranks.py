"""Tensor parallel with two ranks: `python hf_ranks.py FOLDER`; one JSON object on stdout, a key per scenario."""

import json
import sys
import warnings
from pathlib import Path

import ranks
import test_hf_foreign
import tiny
import torch
import transformers
from transformers.distributed import DistributedConfig

import llmkern
from llmkern.nn import PackedLinear

SCHEMES = {
    "int4": ("llama", "rtn-int4-g16"),
    "int4_rows": ("llama", "rtn-int4"),
    "int8_asym": ("llama", "rtn-int8-g16-asym"),
    "w8a8": ("llama", "w8a8"),
    "24": ("llama", "magnitude-2:4"),
    "24_int4": ("llama", "magnitude-2:4-int4-g16"),
    "bitmask": ("llama", "magnitude-0.5"),
    "bitmask_int8": ("llama", "magnitude-0.5-int8"),
    "bias": ("biased", "rtn-int4-g16"),
    "head": ("llama", "all"),
    "mixtral": ("mixtral", "rtn-int8-g8"),
    "mixtral_24": ("mixtral", "magnitude-2:4"),
    "phi3": ("phi3", "rtn-int4-g16"),
    "gpt_oss": ("gpt_oss", "rtn-int4-g8"),
}
GPT_OSS_PLAN = {
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
    "model.layers.*.mlp.experts": "moe_tp_experts",
}


def build(kind):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "biased":
        return tiny.llama(attention_bias=True, mlp_bias=True)
    if kind == "phi3":
        config = transformers.Phi3Config(
            **sizes, vocab_size=tiny.VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0
        )
        return tiny._build(transformers.Phi3ForCausalLM, config)
    return tiny.MODELS[kind](**({"intermediate_size": 32} if kind in tiny.MIXTURES else {}))


def save(kind, scheme, path):
    model = build(kind)
    if scheme == "all":
        llmkern.patch(model, "rtn-int4-g16", ignore=())
    else:
        llmkern.patch(model, scheme)
    llmkern.save(model, path)


def parallel(path, plan="auto"):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(tp_plan=plan, tp_size=2)
    )


def run(path, plan="auto"):
    def work(rank):
        model = parallel(path, plan)
        layers = {name: list(m.shape) for name, m in model.named_modules() if isinstance(m, PackedLinear)}
        ids = tiny.token_ids(2)
        text = model.generate(ids[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False,
                              pad_token_id=0)  # fmt: skip
        notes = {row.name: row.notes for row in llmkern.hf.report(model).rows}
        return {"logits": tiny.output("llama", model, ids).tolist(), "layers": layers, "text": text.tolist(),
                "notes": notes}  # fmt: skip

    return work


def ordered(root):
    """A GPTQ checkpoint whose columns are in the order of their activations."""
    (root / "order").mkdir()
    test_hf_foreign.write("gptq act-order", root / "order", torch.Generator().manual_seed(0))
    llmkern.hf.use_for("gptq")


def refused(rank_does):
    def work(rank):
        try:
            rank_does()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    return work


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    result = {}
    for name, (kind, scheme) in SCHEMES.items():
        save(kind, scheme, root / name)
        one = transformers.AutoModelForCausalLM.from_pretrained(root / name)
        ids = tiny.token_ids(2)
        text = one.generate(ids[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False,
                            pad_token_id=0)  # fmt: skip
        wanted = {"logits": tiny.output("llama", one, ids).tolist(), "text": text.tolist()}
        plan = GPT_OSS_PLAN if kind == "gpt_oss" else "auto"
        result[name] = [wanted, *ranks.together(root, name, 2, run(root / name, plan))]
    save("llama", "rtn-int4-g32", root / "groups")
    result["groups"] = ranks.together(root, "groups", 2, refused(lambda: parallel(root / "groups")))
    save("llama", "rtn-int8", root / "saved")
    saves = refused(lambda: parallel(root / "saved").save_pretrained(root / "again"))
    result["saved"] = ranks.together(root, "saved", 2, saves)
    model = build("mixtral")
    llmkern.patch(model, llmkern.Recipe.parse("rtn-int8", overrides={"experts.1.down_proj": None}))
    llmkern.save(model, root / "mixed")
    result["mixed"] = ranks.together(root, "mixed", 2, refused(lambda: parallel(root / "mixed")))
    dense = refused(lambda: parallel(root / "saved").dequantize())
    result["dequantized"] = ranks.together(root, "dequantized", 2, dense)
    ordered(root)
    result["order"] = ranks.together(root, "order", 2, refused(lambda: parallel(root / "order" / "m")))
    odd = refused(lambda: parallel(root / "saved", {"model.layers.*.mlp.up_proj": "sequence_parallel"}))
    result["style"] = ranks.together(root, "style", 2, odd)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
