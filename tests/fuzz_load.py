"""Folders that were damaged at random, loaded: `python fuzz_load.py SEED FIRST COUNT`; a JSON object per line.

Every input has a number, and the number and SEED give the same input again: `python fuzz_load.py SEED NUMBER 1`.
A process that dies has said which input it was at.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import foreign
import tiny
import torch
from fuzz_damages import DAMAGES, forge

import llmkern

SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32}
# Name -> kind, changes to the model, recipe, arguments of save.
CORPUS: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any]]] = {
    "int4": ("llama", LLAMA, "rtn-int4-g16", {}),
    "int3-asym": ("llama", LLAMA, "rtn-int3-g16-asym", {}),
    "int8": ("llama", LLAMA, "rtn-int8", {"max_shard_size": "9KB"}),
    "w8a8": ("llama", LLAMA, "w8a8", {}),
    "tied": ("llama", {**LLAMA, "tie_word_embeddings": True}, "rtn-int4-g16", {}),
    "2:4-int4": ("llama", LLAMA, "magnitude-2:4-int4-g16", {}),
    "2:4": ("llama", LLAMA, "magnitude-2:4", {"zeros": True}),
    "bitmask": ("llama", LLAMA, "magnitude-0.5", {"zeros": True}),
    "gptq": ("llama", LLAMA, "rtn-int4-g16", {"format": "gptq"}),
    "gptq-3": ("llama", LLAMA, "rtn-int3-g16", {"format": "gptq", "max_shard_size": "9KB"}),
    "dense": ("llama", LLAMA, None, {"format": "dense"}),
    "gpt2": (
        "gpt2", {"vocab_size": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}, "rtn-int4-g16", {}
    ),
    "mixtral": (
        "mixtral", {**LLAMA, "num_local_experts": 2, "head_dim": 16}, "rtn-int4-g16", {}
    ),
}  # fmt: skip


def _codes(bits: int, encode: Any, **options: Any) -> Any:
    """What `foreign.write` calls for each layer."""

    def made(name: str, n: int, k: int) -> Any:
        codes = foreign.make(n, k, bits, group=16, **options)
        return encode(codes), codes.dense()

    return made


# Folders that others wrote. Nothing seals them: a change that makes sense is another model.
FOREIGN: dict[str, tuple[Any, dict[str, Any]]] = {
    "v1-order": (
        _codes(4, foreign.gptq, symmetric=True, order=True), foreign.gptq_config(4, 16, desc_act=True),
    ),
    "v2-3": (
        _codes(3, lambda made: foreign.gptq(made, "gptq_v2"), symmetric=False),
        foreign.gptq_config(3, 16, sym=False, checkpoint_format="gptq_v2"),
    ),
    "awq": (_codes(4, foreign.awq, symmetric=False), foreign.awq_config(16)),
    "packed": (
        _codes(4, lambda made: foreign.pack_quantized(made, symmetric=False), symmetric=False),
        foreign.ct_config("pack-quantized", 4, 16, symmetric=False),
    ),
}  # fmt: skip
CORPUS |= {name: ("llama", LLAMA, None, {"shards": 2 if name == "packed" else 1}) for name in FOREIGN}
SECONDS, SPARE = 20, 1 << 30


class Entry:
    """One folder, its bytes, and what its model says. sealed: it has an llmkern.json."""

    def __init__(self, root: Path, name: str) -> None:
        kind, changes, recipe, options = CORPUS[name]
        options = dict(options)
        zeros, format = options.pop("zeros", False), options.pop("format", "compressed-tensors")
        model = tiny.MODELS[kind](**changes)
        self.kind, self.path = kind, root / name.replace(":", "-")
        self.sealed = name not in FOREIGN
        if not self.sealed:
            encode, quantization = FOREIGN[name]
            linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear} - {"lm_head"}
            work = root / "work"
            foreign.write(work, model, encode, quantization, linear.__contains__, **options)
            (work / "packed").rename(self.path)
            shutil.rmtree(work)
            model = llmkern.load(self.path)
        else:
            if recipe:
                llmkern.patch(model, llmkern.Recipe.parse(recipe, scale_dtype="float16" if format == "gptq" else None))
            if zeros:  # the dense form does not tell the mask
                next(m for m in model.modules() if hasattr(m, "packed")).values.view(-1)[:4] = 0
            llmkern.save(model, self.path, format, **options)
        self.files = {file.name: file.read_bytes() for file in self.path.iterdir()}
        self.logits = logits(kind, model)

    def restore(self) -> None:
        """The folder as it was."""
        shutil.rmtree(self.path)
        self.path.mkdir()
        for name, data in self.files.items():
            (self.path / name).write_bytes(data)


def logits(kind: str, model: Any) -> torch.Tensor:
    return tiny.output(kind, model, tiny.token_ids(1, 6) % 32)


# What may come of it.


def content(path: Path) -> dict[str, bytes | None]:
    return {
        file.name: file.read_bytes() if file.is_file() and not file.is_symlink() else None for file in path.iterdir()
    }


def without_values(name: str, data: bytes | None) -> bytes | None:
    """A file without the values of its tensors."""
    if data is None or not name.endswith(".safetensors"):
        return data
    return data[: 8 + int.from_bytes(data[:8], "little")]


def verdict(entry: Entry, forged: bool) -> str:
    """What came of loading the folder; AssertionError for what must not."""
    now = content(entry.path)
    changed = {
        name for name in now.keys() | entry.files.keys()
        if without_values(name, now.get(name)) != without_values(name, entry.files.get(name))
    }  # fmt: skip
    values = any(name.endswith(".safetensors") and now.get(name) != data for name, data in entry.files.items())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = llmkern.load(entry.path)
        except (ValueError, FileNotFoundError) as error:
            refusal = error
        else:
            refusal = None
    if refusal is not None:
        text = str(refusal)
        assert type(refusal) in (ValueError, FileNotFoundError), f"{type(refusal).__name__}: {text}"
        assert text.startswith("load: "), f"{type(refusal).__name__} of its own: {text}"
        assert len(text) < 10_000, f"an error of {len(text)} characters: {text[:300]}"
        return "refused"
    warned = any("was changed since" in str(warning.message) for warning in said)
    configured = changed & {"config.json", "generation_config.json"}
    free = forged or not entry.sealed or now.get("llmkern.json") is None  # nothing seals what is there
    assert free or warned or not configured, f"{configured} changed in silence"
    try:
        found = logits(entry.kind, model)
    except Exception as error:
        if "config.json" in configured:
            return "another configuration, which does not run"
        if free and isinstance(error, RuntimeError) and re.search("dtype|scalar type", str(error)):
            return "other dtypes, which torch does not multiply"
        raise AssertionError(f"the model does not run: {type(error).__name__}: {error}") from error
    if values or configured or (free and changed):
        return "loaded, of other values"
    assert torch.allclose(found, entry.logits, rtol=1e-3, atol=1e-4), f"another model in silence; changed: {changed}"
    return "loaded, the same"


def one(entries: list[Entry], seed: int, number: int) -> tuple[str, str, str]:
    """Input `number`: which folder, which damages, and what came of it."""
    rng = random.Random(seed * 1_000_003 + number)
    entry = rng.choice(entries)
    damages = rng.sample(DAMAGES, rng.choice([1, 1, 1, 2]))
    forged = entry.sealed and rng.random() < 0.6
    entry.restore()
    for damage in damages:
        damage(rng, entry.path)
    if forged:
        forge(entry.path)
    signal.alarm(SECONDS)
    try:
        return entry.path.name, f"{[d.__name__ for d in damages]}{' forged' * forged}", verdict(entry, forged)
    finally:
        signal.alarm(0)


def slow(*_: Any) -> None:
    raise TimeoutError(f"no end after {SECONDS} seconds")


def main() -> None:
    seed, first, count = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="save: ")
    signal.signal(signal.SIGALRM, slow)
    shm = Path("/dev/shm")
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as root:
        (Path(root) / "outside").write_bytes(b"secret")
        entries = [Entry(Path(root), name) for name in CORPUS]
        for entry in entries:
            assert verdict(entry, False) == "loaded, the same", entry.path.name
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + SPARE, used + SPARE))
        for number in range(first, first + count):
            print(json.dumps({"at": number}), flush=True)
            try:
                _, _, result = one(entries, seed, number)
                counts[result] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                import traceback

                tail = traceback.extract_tb(error.__traceback__)[-3:]
                where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in tail]
                print(
                    json.dumps({"failed": number, "error": f"{type(error).__name__}: {error}"[:600], "where": where}),
                    flush=True,
                )
    print(json.dumps({"done": count, "counts": counts}), flush=True)


if __name__ == "__main__":
    main()
