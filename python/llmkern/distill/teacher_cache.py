"""TeacherCache: what a teacher predicts for some token sequences, on disk, so that training needs no teacher.

    state.json            what the cache is of: teacher, data, settings, versions; the shards with their checksums
    0000.safetensors ...  a shard, of some whole batches:
        keys        uint8 [S, 16]   of each sequence a digest of what the teacher was given
        starts      int64 [S + 1]   where its positions are among all n of the shard
        batches     int64 [B]       how many of the S sequences each batch has
        input_ids   int32 [n]       -1 for padding before or within a sequence; what follows its last token is left out
        indices     int32 [n, k]    classes
        log_probs   fp16 [n, k]     their log-probabilities at the temperature; -inf: no class

fp16 and not bf16: a log-probability is never out of fp16's range, and of the values that matter (0 to -16) fp16 keeps
three bits more, an error of at most 0.004 and of 0.0005 for what is likelier than e^-2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern.state import MANIFEST, check_part, read_manifest

CALLER = "TeacherCache"
NOT_READ = ("labels", "attention_mask", "use_cache", "past_key_values")  # of a batch, beside what its key is made of


class Rows(NamedTuple):
    """A sequence of a cache: input_ids int64 [n] (-1 for padding), indices int32 [n, k], log_probs fp16 [n, k]."""

    input_ids: Tensor
    indices: Tensor
    log_probs: Tensor


class TeacherCache:
    """A cache that `TeacherCache.write` has finished, opened for reading by `TeacherCache.open`.

    Sequences are found by their content, so that batches may come in any order and with any padding to their right. A
    shard is mapped into memory, not read; its checksum is compared when it is first used.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        settings = self.fingerprint["settings"]
        self.k, self.temperature, self.sampled = (
            int(settings["k"]),
            float(settings["temperature"]),
            bool(settings["sample"]),
        )
        self.classes = int(settings["classes"])
        self._parts: list[dict[str, Any]] = manifest["parts"]
        self._checked: dict[int, Any] = {}
        self._places: dict[bytes, tuple[int, int, int]] = {}  # key: shard, first and last position
        self._order: list[bytes] = []
        self._batches: list[int] = []
        for number in range(len(self._parts)):
            shard = self._open(number)
            starts = shard.get_tensor("starts").tolist()
            for at, key in enumerate(shard.get_tensor("keys").numpy()):
                self._places.setdefault(key.tobytes(), (number, starts[at], starts[at + 1]))
                self._order.append(key.tobytes())
            self._batches += shard.get_tensor("batches").tolist()

    @staticmethod
    def write(
        path: str | Path, teacher: nn.Module, batches: Any, *, k: int = 64, temperature: float = 1.0,
        sample: bool = False, seed: int = 0, classes: int | None = None, shard_mb: float = 64, progress: bool = True,
    ) -> TeacherCache:  # fmt: skip
        """Run the teacher over batches and keep its predictions; goes on where the same call was killed.

        batches: token ids int64 [n, L], or an iterable of such tensors or of dicts of tensors [B, L] with input_ids,
        as the models are called. They are all listed first. classes: only the first so many of the teacher's classes
        (for a student with fewer), None: all.

        sample=False keeps the k likeliest classes; what mass they leave is one more class, the tail, of the loss.
        sample=True keeps k draws from p itself with replacement (random sampling distillation, arXiv 2503.16870, whose
        importance weights p_j / q_j are 1 for the proposal q = p): class j gets the probability c_j / k when it was
        drawn c_j times. The expected value of c_j / k is p_j for every class, tail included, so the gradient of
        forward KL in the student's logits, softmax - c / k, is unbiased, which that of the k likeliest is not. The
        draws of a shard depend on `seed` and the shard's number alone.

        A shard of about shard_mb megabytes is written at once, whole or not at all. However the process ends, the
        same call goes on after the last whole shard and gives the same bytes. At most 64 MB of logits are held.

        Raises ValueError for settings or batches that make no sense, for a folder whose cache is of another teacher, of
        other data or settings, or damaged, FileExistsError for a folder of something else, BlockingIOError while
        another process writes there.
        """
        from llmkern.distill.cache_writer import Settings, write

        settings = Settings(k, float(temperature), bool(sample), seed, classes, shard_mb)
        write(Path(path), teacher, batches, settings, progress)
        return TeacherCache.open(path)

    @staticmethod
    def open(path: str | Path) -> TeacherCache:
        """The finished cache in a folder. FileNotFoundError where there is none, ValueError for a part of one."""
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{CALLER} {folder}: holds no {MANIFEST}: no cache was written there")
        manifest = read_manifest(folder / MANIFEST, CALLER)
        wanted = manifest["fingerprint"].get("shards")
        if wanted is None:
            raise ValueError(f"{CALLER} {folder}: its {MANIFEST} is of another kind of run")
        if len(manifest["parts"]) != wanted:
            raise ValueError(
                f"{CALLER} {folder}: only {len(manifest['parts'])} of {wanted} shards are written; the call of write "
                "that began it goes on"
            )
        for entry in manifest["parts"]:
            size = file.stat().st_size if (file := folder / entry["file"]).is_file() else None
            if size != entry["bytes"]:
                got = "no such file" if size is None else f"{size}"
                raise ValueError(f"{CALLER} {folder}: {entry['file']} must have {entry['bytes']} bytes, got {got}")
        return TeacherCache(folder, manifest)

    def __len__(self) -> int:
        """How many sequences there are, twins counted."""
        return len(self._order)

    @property
    def batches(self) -> int:
        """How many batches were written."""
        return len(self._batches)

    def __getitem__(self, number: int) -> Rows:
        """Sequence `number`, in the order in which they were written. IndexError if there is none."""
        return self._read(*self._places[self._order[number]])

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number` as it was written: input_ids and attention_mask [B, L], and indices and log_probs [B, L, k].

        Padding has the id 0 and no class. IndexError if there is no such batch.
        """
        if not 0 <= number < self.batches:
            raise IndexError(f"{CALLER}: batch must be in [0, {self.batches}), got {number}")
        first = sum(self._batches[:number])
        rows = [self[at] for at in range(first, first + self._batches[number])]
        ids, indices, log_probs = (
            nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=fill)  # type: ignore[arg-type]
            for part, fill in zip(zip(*rows, strict=True), (-1, 0, -torch.inf), strict=True)
        )
        mask = (ids >= 0).long()
        return {"input_ids": ids.clamp_min(0), "attention_mask": mask, "indices": indices, "log_probs": log_probs}

    def rows(self, batch: Mapping[str, Any], counted: Tensor) -> tuple[Tensor, Tensor]:
        """indices int32 [R, k] and log_probs fp16 [R, k] at the R positions where counted, bool [B, L], is True.

        batch: what a model would be called with: input_ids [B, L] and whatever else the teacher was given. ValueError
        for a sequence that the cache does not hold.
        """
        indices, log_probs = [torch.empty(0, self.k, dtype=torch.int32)], [torch.empty(0, self.k, dtype=torch.float16)]
        for at, key in enumerate(keys_of(batch)):
            wanted = counted[at].nonzero()[:, 0].cpu()
            if not len(wanted):
                continue
            if key not in self._places:
                raise ValueError(
                    f"{CALLER} {self.folder}: it does not hold sequence {at} of the batch "
                    f"({batch['input_ids'][at][:8].tolist()} ...): wanted exactly what it was written from"
                )
            row = self._read(*self._places[key])
            indices.append(row.indices[wanted])
            log_probs.append(row.log_probs[wanted])
        device = counted.device
        return torch.cat(indices).to(device), torch.cat(log_probs).to(device)

    def _read(self, number: int, first: int, last: int) -> Rows:
        shard = self._shard(number)
        ids, indices, log_probs = (shard.get_slice(name)[first:last] for name in ("input_ids", "indices", "log_probs"))
        return Rows(ids.long(), indices, log_probs)

    def _shard(self, number: int) -> Any:
        """The shard, mapped into memory; its checksum was compared."""
        if number not in self._checked:
            entry = self._parts[number]
            check_part(self.folder / entry["file"], entry, f"{CALLER} {self.folder}")
            self._checked[number] = self._open(number)
        return self._checked[number]

    def _open(self, number: int) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / self._parts[number]["file"]
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{CALLER} {self.folder}: {path.name} cannot be read: {error}") from None


def keys_of(batch: Mapping[str, Any]) -> list[bytes]:
    """Of each sequence 16 bytes that tell what a model is given for it, up to its last token that is no padding.

    ValueError for a tensor of the batch that is not [B, L] as its input_ids.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    read = {name: batch[name] for name in sorted(batch) if name not in NOT_READ and batch[name] is not None}
    for name, value in read.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{CALLER}: {name} of a batch must be {list(ids.shape)} as input_ids, got {got}")
    columns = {name: value.long().masked_fill(mask == 0, -1).cpu() for name, value in read.items()}
    keys = []
    for at, length in enumerate(lengths_of(mask).tolist()):
        digest = hashlib.blake2b(digest_size=16)
        for name, values in columns.items():
            digest.update(f"{name}:{length};".encode())
            digest.update(values[at, :length].contiguous().numpy())
        keys.append(digest.digest())
    return keys


def lengths_of(mask: Tensor) -> Tensor:
    """int64 [B]: of each sequence how many positions there are up to its last token; mask [B, L], 0 for padding."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return ((mask != 0) * positions).amax(1)
