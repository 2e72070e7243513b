"""Two ranks with a streamed model: `python streamed_ranks.py FOLDER`; one JSON object on stdout, a key per scenario."""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import ranks
import tiny
import torch

import llmkern
from llmkern import blocks, layer_solver, pipeline, streaming

# Four llama blocks are two for each rank. opt: biases, and layers outside the blocks; mixtral: experts that are one
# parameter in the model alone; gpt_oss: experts that are one in the files too, with biases.
MODELS = {"llama": {"num_hidden_layers": 4}, "opt": {}, "mixtral": {}, "gpt_oss": {}}
STAY = ("lm_head", "re:.*(o_proj|fc2|experts.1.down_proj)$")  # dense layers, which are read once more for the digest


def whole(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


class Watch:
    """What of a streamed model is in memory: the most blocks with a dense matrix, whenever one was read."""

    def __init__(self, model):
        self.most, self.model, self.start = 0, model, model._llmkern_stream.bytes
        read = model._llmkern_stream.read

        def counted(keys):
            read(keys)
            self.look()

        model._llmkern_stream.read = counted

    def look(self):
        lists = blocks.find_lists(self.model)
        found = [block for _, of in lists for block in of]
        dense = sum(any(not p.is_meta and p.ndim > 1 for p in block.parameters()) for block in found)
        self.most = max(self.most, dense)


def compress(model, recipe, rows, ignore=("lm_head",), **fields):
    """As `ranks.compress`, which reads only what is in memory; and what a streamed model read and had in memory."""
    recipe = llmkern.Recipe.parse(recipe, ignore=ignore, **fields.pop("changes", {}))
    solve, solved = layer_solver.solve_and_keep, []
    layer_solver.solve_and_keep = lambda caller, name, *rest: solved.append(name) or solve(caller, name, *rest)
    make, dense = layer_solver.Solved, []
    layer_solver.Solved = lambda packed, row, values: dense.append(values is not None) or make(packed, row, values)
    watch = Watch(model) if streaming.is_streamed(model) else None
    calibration = list(tiny.token_ids(rows).split(2)) if recipe.needs_calibration else None
    report = llmkern.compress(model, recipe, calibration, progress=False, **fields)
    said = {"rows": [{**vars(row), "seconds": 0} for row in report.rows], "solved": solved, "notes": report.notes}
    said["dense"] = sum(dense)
    if watch:
        said |= {"most": watch.most, "read": model._llmkern_stream.bytes - watch.start}
    return said | {"digest": digest(model)}


def digest(model):
    """Of every tensor, those in files included."""
    found = hashlib.sha256()
    for name in sorted(model.state_dict()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = streaming.parameter(module, leaf) if leaf in module._parameters else module._buffers[leaf]
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run(folder, how, recipe, rows=11, **fields):
    """how: the function that opens the model, or one for each rank."""

    def work(rank):
        opened = (how if callable(how) else how[rank])(folder)
        return compress(opened, recipe, rows, **fields)

    return work


def dies(folder, state):
    """Rank 1 dies in the third block."""

    def work(rank):
        group = pipeline._Run._groups

        def groups(self, layers, *rest, **options):
            if rank == 1 and "model.layers.2.mlp.down_proj" in layers:
                os.kill(os.getpid(), signal.SIGKILL)
            return group(self, layers, *rest, **options)

        pipeline._Run._groups = groups
        return run(folder, llmkern.stream, "gptq-int4-g32", state_dir=state)(rank)

    return work


def dies_writing(folder, state):
    """Rank 0 dies when it has written two parts of a run without data."""

    def work(rank):
        write = layer_solver.State.write

        def written(self, part, solved):
            if len(self.parts) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, part, solved)

        layer_solver.State.write = written
        return run(folder, llmkern.stream, "rtn-int4-g32", state_dir=state)(rank)

    return work


def cut(folder, root, name, recipe, when=None, **fields):
    """Rank 1 has files of its own, the last of which ends early once the model is open, or `when` is called."""

    def work(rank):
        own = root / f"{name}-{rank}"
        shutil.copytree(folder, own)
        model = llmkern.stream(own)

        def shorten():
            path = model._llmkern_stream.files.tensors["model.layers.3.mlp.down_proj.weight"].path
            path.write_bytes(path.read_bytes()[:2000])

        if rank and when is None:
            shorten()
        elif rank:
            call = getattr(pipeline._Run, when)
            setattr(pipeline._Run, when, lambda *args: shorten() or call(*args))
        return compress(model, recipe, 11, **fields)

    return work


def without_the_last(how):
    """A model that does not run its last block, so that none is in a chain."""

    def opened(folder):
        model = how(folder)
        model.config.num_hidden_layers -= 1
        return model

    return opened


def scenarios():
    """Name -> (model, recipe, options): run whole and streamed."""
    found = {
        f"{kind}-{recipe}-{objective}": (kind, recipe, {"changes": {"objective": objective}})
        for kind in MODELS
        for recipe, objective in (("gptq-int4-g16", "model"), ("gptq-int4-g16", "layer"), ("rtn-int4-g16", None))
    }
    found["all"] = ("mixtral", "gptq-int4-g16", {"changes": {"experts": "all"}})
    for kind, recipe in (("llama", "gptq-int4-g16"), ("mixtral", "gptq-int4-g16"), ("gpt_oss", "rtn-int8")):
        found[f"stay-{kind}-{recipe}"] = (kind, recipe, {"ignore": STAY})
    return found


def main():
    torch.set_num_threads(1)
    pipeline.PART_BYTES = 20_000
    root = Path(sys.argv[1])
    for kind, changes in MODELS.items():
        tiny.MODELS[kind](**changes).save_pretrained(root / kind, max_shard_size="60kB")
    llama, result = root / "llama", {}

    def together(name, work):
        result[name] = ranks.together(root, name, 2, work)

    for name, (kind, recipe, options) in scenarios().items():
        for how in (whole, llmkern.stream):
            together(f"{name}-{how.__name__}", run(root / kind, how, recipe, **options))
    for how in (whole, llmkern.stream):
        options = {"ignore": ("lm_head", r"re:.*layers\.3\..*")}
        together(f"irregular-{how.__name__}", run(llama, without_the_last(how), "gptq-int4-g16", rows=4, **options))
    together("mixed", run(llama, (whole, llmkern.stream), "gptq-int4-g16", changes={"objective": "model"}))
    together("unbroken", run(llama, llmkern.stream, "gptq-int4-g32", state_dir=root / "state0"))
    together("killed", dies(llama, root / "state1"))
    together("resumed", run(llama, llmkern.stream, "gptq-int4-g32", state_dir=root / "state1"))
    together("again", run(llama, llmkern.stream, "gptq-int4-g32", state_dir=root / "state1"))
    together("unbroken_rtn", run(llama, llmkern.stream, "rtn-int4-g32"))
    together("killed_rtn", dies_writing(llama, root / "state2"))
    together("resumed_rtn", run(llama, llmkern.stream, "rtn-int4-g32", state_dir=root / "state2"))
    layer = {"objective": "layer"}
    together("cut", cut(llama, root, "cut", "gptq-int4-g32", changes=layer))
    together("cut_later", cut(llama, root, "cut_later", "gptq-int4-g32", "_chain", changes=layer))
    together("cut_rtn", cut(llama, root, "cut_rtn", "rtn-int8"))
    together("cut_state", cut(llama, root, "cut_state", "rtn-int4", state_dir=root / "state3"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
