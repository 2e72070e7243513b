"""A language model's last hidden states without its logits, and what turns one into the other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.calibration import quiet

# Keys of configurations, and how the model's logits follow from those of its linear head.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # c tanh(logits / c): Gemma 2 and 3, RecurrentGemma
FACTORS = ("logit_scale", "lm_head_multiplier")  # logits times it: Cohere, Falcon-H1
DIVISORS = ("logits_scaling",)  # logits divided by it: Granite
FEW = 16  # tokens of the sequence whose logits are compared
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest logit; in narrower types:
COARSE = 0.05


class OutputHead:
    """The linear output head of a language model, and its hidden states at the head's input.

    The model runs whole, but for the head, which gets none of the rows: whatever comes between the blocks and the head
    (norms, BERT's transform) is in the hidden states, and no logits are made.

    role: "student" or "teacher", for errors. Raises TypeError for a model whose head is no dense linear layer.
    """

    def __init__(self, model: nn.Module, role: str) -> None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Linear):
            kind = "none" if head is None else type(head).__name__
            raise TypeError(
                f"DistillWrapper: the {role}'s output head must be a dense linear layer, got {kind} "
                f"({type(model).__name__})"
            )
        self.module, self.role, self.owner = head, role, type(model).__name__
        config = text_config(model)
        self.softcap = next((float(cap) for key in SOFTCAPS if (cap := getattr(config, key, None))), None)
        self.scale = 1.0
        for key in FACTORS:
            self.scale *= getattr(config, key, None) or 1.0
        for key in DIVISORS:
            self.scale /= getattr(config, key, None) or 1.0
        self._takes_use_cache = "use_cache" in inspect.signature(model.forward).parameters

    @property
    def classes(self) -> int:
        """V, the rows of the head's weight."""
        return self.module.out_features

    @property
    def weight(self) -> Tensor:
        """[V, H]. RuntimeError where it is sharded by itself: then it is whole in its own forward alone."""
        weight = self.module.weight
        if hasattr(weight, "full_tensor"):
            raise RuntimeError(
                f"DistillWrapper: the {self.role}'s output head is sharded by itself; shard its blocks and then the "
                "wrapper, whose forward then gathers the head"
            )
        return weight

    @property
    def bias(self) -> Tensor | None:
        """[V], where there is one."""
        return self.module.bias

    def hidden(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """[B, L, H]: what the head would be given, times the model's factor of the logits. RuntimeError if it isn't."""
        extra = {"use_cache": False} if self._takes_use_cache else {}
        with _inputs_of(self.module) as seen:
            model(**batch, **extra)
        if len(seen) != 1:
            raise RuntimeError(
                f"DistillWrapper: the {self.role}'s output head ran {len(seen)} times in a forward of {self.owner}, "
                "wanted 1"
            )
        return seen[0] if self.scale == 1.0 else seen[0] * self.scale

    def logits(self, hidden: Tensor, classes: int | None = None) -> Tensor:
        """[..., V] of hidden states [..., H], of the first `classes` classes alone if that is given."""
        bias = None if self.bias is None else self.bias[:classes]
        logits = nn.functional.linear(hidden, self.weight[:classes], bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def verify(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Compare a few logits with the model's own. ValueError where they differ: the head is not all there is."""
        few = _few(batch)
        with torch.no_grad(), quiet(model):
            wanted = model(**few).logits.float()
            got = self.logits(self.hidden(model, few)).float()
        if wanted.shape != got.shape or not self._close(got, wanted):
            raise ValueError(
                f"DistillWrapper: the {self.role}'s logits must be those of its linear output head (with softcap "
                f"{self.softcap} and factor {self.scale} of its configuration), but {self.owner} gives others"
            )

    def verify_order(self, model: nn.Module, batch: Mapping[str, Any], causal: bool) -> None:
        """ValueError for a model that sees later tokens though it is called causal, or none though it is not."""
        few = _few(batch)
        ids = few["input_ids"]
        if ids.shape[1] < 2:
            return
        other = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % self.classes), dim=1)
        with torch.no_grad(), quiet(model):
            before, after = (self.hidden(model, {**few, "input_ids": given})[:, :-1].float() for given in (ids, other))
        if self._close(before, after) != causal:
            seen, wanted = ("no", "False") if not causal else ("later", "True")
            raise ValueError(
                f"DistillWrapper: {self.owner} sees {seen} tokens after its own position, which is not causal={wanted}"
            )

    def _close(self, got: Tensor, wanted: Tensor) -> bool:
        """Whether they are equal, but for rounding."""
        narrow = torch.is_autocast_enabled(got.device.type)
        tolerance = COARSE if narrow else TOLERANCE.get(self.module.weight.dtype, COARSE)
        return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t predicts token t + 1 (a causal model) or its own (a masked one), by the model's class.

    ValueError where the name of the class does not tell.
    """
    for name in (kind.__name__ for kind in type(model).__mro__):
        if name.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")):
            return not name.endswith("ForMaskedLM")
    raise ValueError(
        f"DistillWrapper: causal must be True or False for a {type(model).__name__}: its name does not tell whether "
        "labels are shifted"
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part; None where it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _few(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A few tokens of the batch's longest sequence, from its first that is no padding; all of what cannot be cut."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if any(value.shape[:2] != ids.shape for value in batch.values() if isinstance(value, Tensor)):
        return dict(batch)
    row = int((mask != 0).sum(1).argmax())
    first = int((mask[row] != 0).int().argmax())
    last = min(first + FEW, int((mask[row] != 0).nonzero().max()) + 1)
    cut = (slice(row, row + 1), slice(first, last))
    return {name: value[cut] if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _inputs_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the head is given, and give it no rows of it: a hook, so that others' hooks (FSDP's) still run."""
    seen: list[Tensor] = []

    def take(module: nn.Module, args: tuple) -> tuple:
        seen.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        handle.remove()
