"""What happens to the files of a checkpoint: each damage takes a generator and a folder, and changes files in it."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import torch

from llmkern._files import digest
from llmkern.checkpoint_folder import header_digest, seal

NASTY = [
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 16, 33, 255, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 63,
    -(1 << 63), 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "a", "4", "../x", "/etc/passwd", "\u0000",
    "é" * 50, "x" * 5000, [], {}, [[]], [0], [1, 2], [-1, -1], [1 << 62, 4], ["a"], {"a": {}}, {"": 0}, "int8",
    "Int8Weight", "BitmaskWeight", "Int4Weight", "Sparse24Weight", "GPT2LMHeadModel", "LlamaForCausalLM",
    "compressed-tensors", "gptq", "dense", "gelu", "float16", "static",
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U32", "BOOL", "F8_E4M3", "F4", "", "C64"]


def some_file(rng: random.Random, path: Path, end: str = "") -> Path | None:
    found = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(end))
    return rng.choice(found) if found else None


def bytes_of(rng: random.Random, path: Path) -> None:
    """Some bytes of a file, often of a header."""
    file = some_file(rng, path)
    if file is None:
        return
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        at = rng.randrange(rng.choice([len(data), min(len(data), 9), min(len(data), 2000)]) or 1)
        size = rng.choice([1, 1, 2, 8, 300])
        piece = data[at : at + size]
        how = rng.randrange(8)
        if how == 0:
            data[at : at + size] = bytes(rng.randrange(256) for _ in piece)
        elif how == 1:
            data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << rng.randrange(8)])
        elif how == 2:
            del data[at : at + size]
        elif how == 3:
            data[at:at] = piece
        elif how == 4:
            del data[at:]
        elif how == 5:
            data += bytes(size)
        elif how == 6:
            data[at : at + size] = bytes(len(piece))
        else:
            data[at : at + size] = rng.choice([b"9", b"-", b"{", b'"', b"[", b"\xff", b"1e9", b"null"])
    file.write_bytes(data)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def edited(rng: random.Random, data: Any) -> str:
    """A JSON text with one value, key or more of it changed."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        spots = [spot for spot in places(data) if spot]
        if not spots:
            break
        # Rare keys as often as those that every layer has.
        keys = sorted({str(spot[-1]) for spot in spots})
        key = rng.choice(keys)
        spot = rng.choice([spot for spot in spots if str(spot[-1]) == key])
        home = data
        for step in spot[:-1]:
            home = home[step]
        key, how = spot[-1], rng.randrange(6)
        if how == 0:
            del home[key]
        elif how == 1 and isinstance(home, dict):
            home[rng.choice([str(key) + "x", "unknown", str(key)[:-1]])] = home.pop(key)
        elif how == 2 and isinstance(home[key], int) and not isinstance(home[key], bool):
            home[key] = rng.choice([home[key] + rng.choice([-8, -1, 1, 8]), home[key] * 2, -home[key], home[key] // 2])
        elif how == 3 and len(spots) > 1:
            other = rng.choice(spots)
            value = data
            with contextlib.suppress(KeyError, IndexError, TypeError):
                for step in other:
                    value = value[step]
            home[key] = json.loads(json.dumps(value))
        else:
            home[key] = rng.choice(NASTY)
    text = json.dumps(data)
    how = rng.randrange(40)
    if how == 0:
        text = text.replace("{", '{"config":' + "[" * 100_000 + "]" * 100_000 + ",", 1)
    elif how == 1:
        key = rng.choice(["layers", "config_groups", "weight_map", "hidden_size", "format"])
        text = text.replace("{", f'{{"{key}":{{}},', 1)
    elif how == 2:
        text = text.replace("{", '{"a":' + "9" * 5000 + ",", 1)
    elif how == 3:
        text = rng.choice(["[]", "null", "1", '"a"', "", "{}", "[" * 5000, '{"a":1' * 2000])
    return text


def json_of(rng: random.Random, path: Path) -> None:
    """A JSON file."""
    file = some_file(rng, path, ".json")
    if file is not None:
        with contextlib.suppress(ValueError, RecursionError):
            file.write_text(edited(rng, json.loads(file.read_bytes())), encoding="utf-8")


def header_of(rng: random.Random, path: Path) -> None:
    """The header of a safetensors file."""
    file = some_file(rng, path, ".safetensors")
    data = b"" if file is None else file.read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        one, two = header[rng.choice(names)], header[rng.choice(names)]
        how = rng.randrange(8)
        if how == 0:
            one["dtype"] = rng.choice(DTYPES)
        elif how == 1:
            one["shape"] = rng.choice(
                [one["shape"][::-1], [*one["shape"], 1], [1, *one["shape"]], [-1, -1], [1 << 62, 4], []]
            )
        elif how == 2:
            one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
        elif how == 3:
            one["data_offsets"][rng.randrange(2)] += rng.choice([-8, -1, 1, 8, 1 << 40])
        elif how == 4:
            first, second = rng.choice(names), rng.choice(names)
            header[first], header[second] = header[second], header[first]
        text = json.dumps(header).encode() if how < 5 else edited(rng, header).encode()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return
    size = rng.choice([len(text)] * 6 + [0, len(text) - 1, len(text) + 1, 1 << 20, 1 << 40, (1 << 64) - 1])
    assert file is not None
    file.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])


def tensors_of(rng: random.Random, path: Path) -> None:
    """Values, dtypes, shapes and names of tensors in a well-formed file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    file = some_file(rng, path, ".safetensors")
    if file is None:
        return
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError):
        return
    for _ in range(rng.choice([1, 1, 2])):
        if not (leaves := sorted({name.rpartition(".")[2] for name in tensors})):
            break
        leaf = rng.choice(leaves)
        name = rng.choice([name for name in tensors if name.rpartition(".")[2] == leaf])
        tensor, how = tensors[name], rng.randrange(11)
        if how == 0:
            del tensors[name]
        elif how == 1:
            tensors[name + rng.choice(["", ".weight", "x", ".bias"])] = tensor.clone()
        elif how == 2:
            tensors[name] = tensor.to(
                rng.choice(
                    [torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.float64, torch.bool]
                )
            )
        elif how == 3:
            tensors[name] = tensor.flatten()[: rng.choice([0, 1, max(tensor.numel() - 1, 0)])].clone()
        elif how == 4 and tensor.ndim == 2:
            tensors[name] = tensor.T.contiguous()
        elif how == 5 and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), 0.0, -1.0])
        elif how == 6 and not tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([0, 1, 3, 127])
        elif how == 7:
            tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor[None]
        elif how == 8:
            tensors[name] = tensor.unsqueeze(0)
        elif how == 9:
            tensors[name] = torch.zeros(rng.choice([(0,), (0, 0), (1,), (1, 1), (), (2, 2, 2)]), dtype=tensor.dtype)
        else:
            tensors[name] = tensors[rng.choice(sorted(tensors))].clone()
    with contextlib.suppress(SafetensorError):
        save_file(tensors, file, {"format": "pt"})


def files_of(rng: random.Random, path: Path) -> None:
    """Whole files: gone, empty, another's, folders, links."""
    file, other = some_file(rng, path), some_file(rng, path)
    if file is None or other is None:
        return
    data, how = file.read_bytes(), rng.randrange(8)
    if how == 7:
        name = rng.choice(["llmkern.safetensors", "model.safetensors", "model.safetensors.index.json"])
        (path / name).write_bytes(data)
        return
    file.unlink()
    if how == 1:
        file.write_bytes(b"")
    elif how == 2:
        file.mkdir()
    elif how == 3 and other.is_file():
        file.write_bytes(other.read_bytes())
    elif how == 4:
        file.symlink_to(file)
    elif how == 5:
        file.symlink_to("/dev/zero" if rng.randrange(2) else path.parent / "outside")
    elif how == 6:
        file.write_bytes(data * 2)


def index_of(rng: random.Random, path: Path) -> None:
    """Names in the index that lead elsewhere."""
    file = path / "model.safetensors.index.json"
    name = rng.choice(
        ["../outside", "/dev/zero", "..", "", "config.json", "model.safetensors", "a/b.safetensors", "\u0000"]
    )
    with contextlib.suppress(ValueError, OSError, KeyError, IndexError, AttributeError, TypeError, RecursionError):
        index = json.loads(file.read_bytes())
        keys = sorted(index["weight_map"])
        for key in rng.sample(keys, rng.choice([1, len(keys)])):
            index["weight_map"][key] = rng.choice([name, name, index["weight_map"][rng.choice(keys)]])
        file.write_text(json.dumps(index), encoding="utf-8")


def forge(path: Path) -> None:
    """Checksums that fit what is there, as whoever means harm would write them."""
    if not (path / "llmkern.json").is_file():
        return
    with contextlib.suppress(ValueError, OSError, AttributeError, TypeError, RecursionError):
        meta = json.loads((path / "llmkern.json").read_bytes())
        if not isinstance(meta.get("sha256"), dict):
            return
        meta["headers"] = {
            file.name: header_digest(file) for file in path.glob("*.safetensors") if not file.is_symlink()
        }
        for name in meta["sha256"]:
            if name.endswith(".json") and (path / name).is_file() and not (path / name).is_symlink():
                meta["sha256"][name] = digest(path / name)
        meta["seal"] = seal(meta)
        (path / "llmkern.json").write_text(json.dumps(meta), encoding="utf-8")


DAMAGES = [
    bytes_of,
    bytes_of,
    json_of,
    json_of,
    json_of,
    header_of,
    header_of,
    tensors_of,
    tensors_of,
    files_of,
    index_of,
]
