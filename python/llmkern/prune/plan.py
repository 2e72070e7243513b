"""StructuredPlan: which blocks, channels and heads of a model stay. Made by `plan_structured`, or by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmkern._json import read_object

FORMAT = "llmkern structured plan 1"


@dataclass(frozen=True)
class KeptBlock:
    """A block that stays, and what stays of it: rising numbers of channels and of query heads; None for all.

    The key-value heads that stay are those of the query heads.
    """

    name: str
    channels: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StructuredPlan:
    """What stays of a model. Frozen; `to_json` and `load` give the same plan again.

    method: how it was chosen. model: the fingerprint of the model that it is for (`llmkern.fingerprint.about_model`).
    config: the entries of the configuration that change. channel_reader, head_reader: the layers within a block whose
    inputs get narrower, None where none do. influence: of every block of the model, 1 - cos of its input and output,
    where blocks were chosen by it (ShortGPT, arXiv 2403.03853).
    """

    method: str
    model: Mapping[str, Any]
    config: Mapping[str, Any]
    blocks: tuple[KeptBlock, ...]
    channel_reader: str | None = None
    head_reader: str | None = None
    influence: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """ValueError unless something stays, in order, and of the same size in every block."""
        if not self.blocks:
            raise ValueError("StructuredPlan: no block stays")
        for what, reader in (("channels", self.channel_reader), ("heads", self.head_reader)):
            kept = [getattr(block, what) for block in self.blocks]
            if any((units is None) != (reader is None) for units in kept):
                raise ValueError(f"StructuredPlan: {what} must be given for all blocks, with their reader, or for none")
            if reader is None:
                continue
            if len(set(map(len, kept))) > 1:
                sizes = sorted(set(map(len, kept)))
                raise ValueError(f"StructuredPlan: every block must keep as many {what}, got {sizes}")
            for block, units in zip(self.blocks, kept, strict=True):
                if not units or units[0] < 0 or any(a >= b for a, b in itertools.pairwise(units)):
                    raise ValueError(f"StructuredPlan: the {what} of {block.name} must be rising and at least one")

    def indices(self) -> tuple[int, ...]:
        """The numbers of the blocks that stay."""
        return tuple(int(block.name.rpartition(".")[2]) for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StructuredPlan:
        """The plan of `to_dict`, also after JSON. ValueError for anything else."""
        try:
            return cls._from_dict(dict(data))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"StructuredPlan: not a plan: {type(error).__name__}: {error}") from None

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to `path` too if one is given."""
        text = json.dumps(self.to_dict(), ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def load(cls, path: str | Path) -> StructuredPlan:
        """The plan in a JSON file. ValueError for a file that cannot be read or is no plan."""
        return cls.from_dict(read_object(Path(path), "StructuredPlan"))

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> StructuredPlan:
        if (found := data.pop("format", None)) != FORMAT:
            raise ValueError(f"StructuredPlan: format must be {FORMAT!r}, got {found!r:.100}")
        if unknown := data.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"StructuredPlan: unknown key {', '.join(sorted(map(str, unknown)))}")
        blocks = tuple(
            KeptBlock(_text(one["name"]), _numbers(one["channels"]), _numbers(one["heads"])) for one in data["blocks"]
        )
        for key in ("model", "config"):
            if not isinstance(data[key], Mapping):
                raise TypeError(f"{key} must be an object")
        return cls(**{**data, "blocks": blocks, "influence": tuple(map(float, data["influence"]))})


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.rpartition(".")[2].isdecimal():
        raise TypeError(f"a block's name must end in its number, got {value!r:.100}")
    return value


def _numbers(values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise TypeError("units must be whole numbers")
    return tuple(values)
