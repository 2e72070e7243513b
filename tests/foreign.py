"""Checkpoints as other projects write them, made from the definitions of their formats by slow loops over integers.

Nothing here uses llmkern: a row of codes is one large Python integer, and its words are cut from that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Made:
    """Codes u [N, K], zero points z [N, G], scales [N, G], and the group of each column [K]."""

    u: torch.Tensor
    z: torch.Tensor
    s: torch.Tensor
    index: torch.Tensor
    bits: int

    def dense(self):
        """(u - z) * s, exact in float32."""
        at = self.index.long()
        return (self.u - self.z[:, at]).float() * self.s.float()[:, at]


def make(n, k, bits, *, symmetric, group=None, dtype=torch.float16, order=False, seed=0, low_zero=1):
    """Random codes; `order`: columns are grouped at random, as many to a group as it holds; low_zero: least z."""
    generator = torch.Generator().manual_seed(1000 * n + k + 7 * bits + seed)
    group = group or k
    groups = -(-k // group)
    u = torch.randint(0, 2**bits, (n, k), generator=generator)
    z = torch.full((n, groups), 2 ** (bits - 1))
    if not symmetric:
        z = torch.randint(low_zero, 2**bits, (n, groups), generator=generator)
        z[0, 0] = 2**bits - 1 if bits < 8 else 200  # never by chance the symmetric one
    s = (torch.rand(n, groups, generator=generator) * 0.04 + 0.01).to(dtype)
    index = torch.arange(k) // group
    if order:
        index = index[torch.randperm(k, generator=generator)]
    return Made(u, z, s, index, bits)


def words_of(value, count):
    """The lowest `count` words of a large integer, as int32 holds them."""
    words = [value >> 32 * at & 0xFFFFFFFF for at in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def dense_row(codes, bits):
    value = sum(int(code) << at * bits for at, code in enumerate(codes))
    return words_of(value, -(-len(codes) * bits // 32))


def padded_row(codes, bits):
    per = 32 // bits
    value = sum(int(code) << 32 * (at // per) + bits * (at % per) for at, code in enumerate(codes))
    return words_of(value, -(-len(codes) // per))


def int32(rows):
    return torch.tensor(rows, dtype=torch.int32)


def gptq(made, version="gptq", borrow=False):
    """AutoGPTQ's tensors. v1 holds z - 1, in each field or (borrow) subtracted from whole words."""
    bits, mask = made.bits, 2**made.bits - 1
    zeros = []
    for row in made.z.T.tolist():
        if version == "gptq" and not borrow:
            row = [z - 1 & mask for z in row]
        words = [word & 0xFFFFFFFF for word in dense_row(row, bits)]
        if version == "gptq" and borrow:
            ones = sum(1 << at * bits for at in range(len(row)))
            words = [(word - (ones >> 32 * at & 0xFFFFFFFF)) % 2**32 for at, word in enumerate(words)]
        zeros.append(words_of(sum(word << 32 * at for at, word in enumerate(words)), len(words)))
    return {
        "qweight": int32([dense_row(row, bits) for row in made.u.tolist()]).T.contiguous(),
        "qzeros": int32(zeros),
        "scales": made.s.T.contiguous(),
        "g_idx": made.index.to(torch.int32),
    }


def awq(made, zero_point=True):
    def word_rows(matrix):
        rows = []
        for row in matrix.tolist():
            eights = range(0, len(row), 8)
            words = [sum(row[at + AWQ_ORDER[i]] << 4 * i for i in range(8)) for at in eights]
            rows.append(words_of(sum(word << 32 * at for at, word in enumerate(words)), len(words)))
        return int32(rows)

    tensors = {"qweight": word_rows(made.u.T), "scales": made.s.T.contiguous()}
    return tensors | ({"qzeros": word_rows(made.z.T)} if zero_point else {})


def pack_quantized(made, *, symmetric, row=dense_row, index=False):
    """compressed-tensors: the same unsigned codes, zero points packed along N."""
    tensors = {
        "weight_packed": int32([row(codes, made.bits) for codes in made.u.tolist()]),
        "weight_scale": made.s.clone(),
        "weight_shape": torch.tensor(made.u.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = int32([row(zeros, made.bits) for zeros in made.z.T.tolist()]).T.contiguous()
    return tensors | ({"weight_g_idx": made.index.to(torch.int32)} if index else {})


def int_quantized(made, *, symmetric=True):
    half = 2 ** (made.bits - 1)
    tensors = {"weight": (made.u - half).to(torch.int8), "weight_scale": made.s.clone()}
    return tensors | ({} if symmetric else {"weight_zero_point": (made.z - half).to(torch.int8)})


def mask_24(n, k, generator):
    return torch.rand(n, k // 4, 4, generator=generator).argsort(-1).lt(2).view(n, k)


def mask_bytes(mask):
    rows = []
    for row in mask.tolist():
        value = sum(1 << at for at, bit in enumerate(row) if bit)
        rows.append([value >> 8 * at & 255 for at in range(-(-len(row) // 8))])
    return torch.tensor(rows, dtype=torch.uint8)


def sparse_24_bitmask(dense, mask):
    return {
        "compressed": torch.stack([row[keep] for row, keep in zip(dense, mask, strict=True)]),
        "bitmask": mask_bytes(mask),
        "shape": torch.tensor(dense.shape).reshape(2, 1),
    }


def sparse_bitmask(dense, mask):
    counts = mask.sum(1)
    return {
        "compressed": dense[mask],
        "bitmask": mask_bytes(mask),
        "shape": torch.tensor(dense.shape),
        "row_offsets": counts.cumsum(0) - counts,
    }


def marlin_24(q, scales, bits, group):
    """Signed codes q [N, K] that are 2:4, element by element to where the Sparse-Marlin kernel reads them."""
    n, k = q.shape
    kept, meta = torch.zeros(k // 2, n, dtype=torch.int64), torch.zeros(n, k // 16, dtype=torch.int64)
    for row in range(n):
        for quad in range(k // 4):
            four = q[row, 4 * quad : 4 * quad + 4].tolist()
            at = [i for i in range(4) if four[i]]
            at = sorted((at + [i for i in (3, 2, 1, 0) if i not in at])[:2])
            kept[2 * quad, row], kept[2 * quad + 1, row] = (four[i] + 2 ** (bits - 1) for i in at)
            meta[row, quad // 4] |= (at[0] | at[1] << 2) << 4 * (quad % 4)
    slots = (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else (0, 2, 1, 3)
    rows = []
    for top in range(0, k // 2, 16):
        stored = []
        for left in range(0, n, 64):
            for lane in range(32):
                for pair in range(4):
                    eight = [
                        int(kept[top + 2 * (lane % 4) + step, left + 8 * (lane // 4) + pair + 4 * upper])
                        for upper in (0, 1) for step in (0, 1, 8, 9)
                    ]  # fmt: skip
                    for start in range(0, 8, len(slots)):
                        stored += [eight[start + slot] for slot in slots]
        rows.append(dense_row(stored, bits))
    reordered = [0] * (n * (k // 16))
    for row in range(n):
        for column in range(k // 16):
            # CUTLASS: rows inside 64, then the 2x2 blocks transposed, then columns two by two.
            to = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
            right = column
            if to % 2 == 0 and right % 2 == 1:
                to, right = to + 1, right - 1
            elif to % 2 == 1 and right % 2 == 0:
                to, right = to - 1, right + 1
            value = int(meta[row, column])
            reordered[right // 2 * 2 * n + 2 * to + right % 2] = value - 2**16 if value >= 2**15 else value
    scale = scales.T.contiguous()
    if group is not None:
        scale = scale.view(-1, n // 8, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1, n).contiguous()
    return {
        "weight_packed": int32(rows),
        "scale_packed": scale,
        "meta": torch.tensor(reordered, dtype=torch.int16).view(k // 32, 2 * n),
    }


def write(path: Path, model, encode, quantization, chosen, shards=1):
    """Save `model` with the chosen matrices as `encode(name, n, k)` -> (tensors, dense [N, K]) makes them.

    `path / "packed"` is the checkpoint, `path / "dense"` the same numbers in float32. Returns name -> dense.
    """
    model.save_pretrained(path / "dense")
    tensors = load_file(path / "dense" / "model.safetensors")
    config = json.loads((path / "dense" / "config.json").read_text())
    conv1d = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    packed, dense, made = {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removesuffix(".weight")
        if not (key.endswith(".weight") and tensor.ndim == 2 and chosen(name)):
            packed[key] = dense[key] = tensor
            continue
        turned = name in conv1d
        n, k = tensor.shape[::-1] if turned else tensor.shape
        own, values = encode(name, n, k)
        packed |= {f"{name}.{leaf}": part.clone() for leaf, part in own.items()}
        made[name] = values
        dense[key] = values.T.contiguous() if turned else values
    (path / "packed").mkdir()
    save(path / "packed", packed, shards)
    config["quantization_config"] = quantization
    (path / "packed" / "config.json").write_text(json.dumps(config))
    save_file(dense, path / "dense" / "model.safetensors", {"format": "pt"})
    return made


def save(folder, tensors, shards=1):
    """One file, or several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, index = sorted(tensors), {}
    for at in range(shards):
        file = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        own = names[at::shards]
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def gptq_config(bits, group, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": True, "desc_act": False, **more}


def awq_config(group, **more):
    return {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm", **more}


def ct_config(layout, bits, group, *, symmetric=True, activations=None, targets=("Linear",), **more):
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
        "group_size": group, "dynamic": False, "actorder": None,
    }  # fmt: skip
    group_0 = {"targets": list(targets), "weights": weights, "input_activations": activations, "format": layout}
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group_0}, **more,
    }  # fmt: skip


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
