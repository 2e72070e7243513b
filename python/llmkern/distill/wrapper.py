"""DistillWrapper: a student and its teacher as one module that returns a loss, for any training loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.distill._checks import check_cache, check_numbers, tokens_of
from llmkern.distill.heads import OutputHead, shifts_labels
from llmkern.distill.hidden import HiddenLoss, Pairs, outputs_of
from llmkern.distill.teacher_cache import TeacherCache
from llmkern.distill.vocabulary import check_classes
from llmkern.ops import DistillLoss, linear_kl_div, linear_kl_div_topk

IGNORED = -100  # the label that transformers leaves out
STUDENT = "student."


class DistillWrapper(nn.Module):
    """A student with the loss against its teacher: `wrapper(**batch)["loss"]`.

    Runs in stock transformers.Trainer, in accelerate and in a plain loop. Its parameters and its state dict are the
    student's alone; of a transformers student it is a PreTrainedModel, whose `save_pretrained`, `config`, `generate`
    and so on are the student's, so that what Trainer saves is the student as stock transformers loads it.

    student: a transformers model with a linear output head. teacher: another such model, which runs without gradients,
    in eval mode and without a cache of keys and values, or a `TeacherCache` of the very token sequences that are
    trained on. Neither model's logits are ever held for all rows (`llmkern.ops.linear_kl_div`).

    kind, beta, alpha, temperature T, t2_scale, ce_weight, workspace_mb: those of `linear_kl_div`. A cache was written
    for one temperature, and serves only "forward_kl".
    hidden: None, "cosine" or "squarehead", added hidden_weight times; layers: pairs of blocks (`HiddenLoss`).
    causal: whether position t predicts token t + 1; None: by the model's class.
    tokenizers: the student's and the teacher's, to be compared. Heads of different sizes are compared over the classes
    that both have, and only with `tokenizers` that agree or with shared_prefix=True.

    Raises ValueError or TypeError for what does not fit, before any work; on the first batch ValueError for a model
    whose logits are not those of its linear head.
    """

    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch

    def __init__(
        self, student: nn.Module, teacher: nn.Module | TeacherCache, *, kind: str = "forward_kl", beta: float = 0.5,
        alpha: float = 0.1, temperature: float = 1.0, t2_scale: bool = True, ce_weight: float = 0.0,
        hidden: str | None = None, hidden_weight: float = 1.0, layers: Pairs | None = None, causal: bool | None = None,
        tokenizers: tuple[Any, Any] | None = None, shared_prefix: bool = False, workspace_mb: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_numbers(kind, temperature, ce_weight, hidden_weight)
        if student is teacher:
            raise ValueError("DistillWrapper: student and teacher are the same model; make the student a copy")
        self.student = student
        self._head = OutputHead(student, "student")
        self._causal = shifts_labels(student) if causal is None else causal
        self._divergence: dict[str, Any] = {"kind": kind, "beta": beta, "alpha": alpha}
        self._options: dict[str, Any] = {
            "temperature": temperature, "t2_scale": t2_scale, "ce_weight": ce_weight, "softcap": self._head.softcap,
            "workspace_mb": workspace_mb,
        }  # fmt: skip
        self._hidden: HiddenLoss | None = None
        self._hidden_weight = hidden_weight
        self._verified = False
        if isinstance(teacher, TeacherCache):
            check_cache(teacher, kind, temperature, hidden)
            classes = teacher.classes
        else:
            self._teacher_head = OutputHead(teacher, "teacher")
            classes = self._teacher_head.classes
            if hidden is not None:
                self._hidden = HiddenLoss(student, teacher, hidden, layers)
            teacher.eval()
        check_classes(self._head.classes, classes, tokenizers, shared_prefix)
        if isinstance(teacher, TeacherCache) and classes > self._head.classes:
            raise ValueError(
                f"DistillWrapper: the cache has {classes} classes, more than the student's {self._head.classes}; write "
                f"it with classes={self._head.classes}"
            )
        # Not a submodule: neither the optimizer, the state dict nor what shards the student should see it.
        object.__setattr__(self, "teacher", teacher)
        self.__class__ = _face(type(self), type(student))  # type: ignore[arg-type]

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        position_ids: Tensor | None = None, token_type_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None, **more: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """0-d tensors: "loss", and without gradients "divergence", "cross_entropy", "agreement", and maybe "hidden".

        input_ids int64 [B, L]; attention_mask [B, L], 0 for padding; labels int64 [B, L] as transformers has them: not
        shifted, -100 for what does not count. Without labels every token that is no padding counts (a masked model then
        has no cross-entropy, and learns the teacher's distribution at every position). What else is given goes to both
        models. num_items_in_batch divides the sums over rows instead of this batch's own number of rows.

        Raises ValueError for an empty batch, shapes that do not fit, labels all of which are ignored (unless
        num_items_in_batch says that other parts of the batch have some), and sequences that are not in the cache.
        """
        batch = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "token_type_ids": token_type_ids, **more,
        }  # fmt: skip
        batch = {key: value for key, value in batch.items() if value is not None}
        tokens = tokens_of(input_ids, attention_mask)
        targets = self._targets(batch["input_ids"], tokens, labels, num_items_in_batch)
        self._verify(batch)
        outputs: dict[int, Tensor] = {}
        with self._watch("student", outputs):
            hidden = self._head.hidden(self.student, batch)
        loss, theirs = self._compare(_fitting(hidden, self._head), targets, batch, num_items_in_batch)
        result = {**loss._asdict()}
        if self._hidden is not None:
            value = self._hidden(outputs, theirs, tokens)
            if num_items_in_batch is not None:  # as the mean over rows: each row's share of the whole batch
                value = value * ((targets != IGNORED).sum() / num_items_in_batch)
            result["loss"] = result["loss"] + self._hidden_weight * value
            result["hidden"] = value.detach()
        return result

    @property
    def settings(self) -> dict[str, Any]:
        """What the loss is, as plain values: two wrappers of the same models with the same settings do the same."""
        watched = self._hidden
        hidden = None if watched is None else [watched.kind, list(map(list, watched.pairs)), self._hidden_weight]
        return {**self._divergence, **self._options, "causal": self._causal, "hidden": hidden}

    def save_pretrained(self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None, **options: Any) -> None:
        """The student's save_pretrained; state_dict: this module's or the student's, where it was gathered before."""
        self.student.save_pretrained(path, state_dict=_of_student(state_dict), **options)  # type: ignore[operator]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; a state dict of the student, such as `save_pretrained` wrote, is taken too."""
        if any(name.startswith(STUDENT) for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        return self.student.load_state_dict(state_dict, strict, assign)

    def __getattr__(self, name: str) -> Any:
        """The student's attribute, where this module has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student":
                raise
            return getattr(self.student, name)

    def _targets(self, ids: Tensor, tokens: Tensor, labels: Tensor | None, num_items: int | Tensor | None) -> Tensor:
        """int64 [B, L]: what each row is to predict, IGNORED where it counts nowhere."""
        if labels is None and not self._causal and self._options["ce_weight"]:
            raise ValueError("DistillWrapper: ce_weight of a masked model needs labels, got None")
        if labels is None:
            labels = ids.masked_fill(~tokens, IGNORED)
        elif labels.shape != ids.shape:
            raise ValueError(f"DistillWrapper: labels must be {list(ids.shape)} as input_ids, got {list(labels.shape)}")
        if self._causal:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        labels = labels.masked_fill(~tokens, IGNORED)  # what stands on padding means nothing
        if num_items is None and not (labels != IGNORED).any():
            raise ValueError(
                f"DistillWrapper: a batch must have a label that counts, got {list(ids.shape)} tokens and none does"
            )
        return labels

    def _verify(self, batch: Mapping[str, Any]) -> None:
        """On the first batch: whether each head is all that comes after the hidden states."""
        if self._verified:
            return
        self._head.verify(self.student, batch)
        self._head.verify_order(self.student, batch, self._causal)
        if isinstance(self.teacher, nn.Module):
            self._teacher_head.verify(self._ready_teacher(batch["input_ids"].device), batch)
        self._verified = True

    def _compare(
        self, hidden: Tensor, targets: Tensor, batch: Mapping[str, Any], num_items: int | Tensor | None
    ) -> tuple[DistillLoss, dict[int, Tensor]]:
        """The loss of the student's hidden states [B, L, H], and the teacher's blocks' outputs that were asked for."""
        mine = self._head
        outputs: dict[int, Tensor] = {}
        if isinstance(self.teacher, TeacherCache):
            counted = targets != IGNORED
            indices, log_probs = self.teacher.rows(batch, counted)
            loss = linear_kl_div_topk(
                hidden[counted], mine.weight, indices, log_probs, targets[counted], tail=not self.teacher.sampled,
                num_items=num_items, student_bias=mine.bias, **self._options,
            )  # fmt: skip
            return loss, outputs
        head, teacher = self._teacher_head, self._ready_teacher(hidden.device)
        with torch.no_grad(), self._watch("teacher", outputs):
            theirs = _fitting(head.hidden(teacher, batch), head)
        loss = linear_kl_div(
            hidden, mine.weight, theirs, head.weight, targets, num_items=num_items, student_bias=mine.bias,
            teacher_bias=head.bias, teacher_softcap=head.softcap, **self._divergence, **self._options,
        )  # fmt: skip
        return loss, outputs

    def _watch(self, role: str, outputs: dict[int, Tensor]) -> Any:
        """A context that collects the outputs of the blocks whose hidden states are compared."""
        return nullcontext() if self._hidden is None else outputs_of(getattr(self._hidden, role), outputs)

    def _ready_teacher(self, device: torch.device) -> nn.Module:
        """The teacher on `device` and in eval mode, whatever was done to it meanwhile."""
        teacher: nn.Module = self.teacher
        if self._teacher_head.module.weight.device != device:
            teacher.to(device)
        return teacher.eval() if teacher.training else teacher


def _fitting(hidden: Tensor, head: OutputHead) -> Tensor:
    """Hidden states in the dtype of the head; autocast has its own."""
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(head.module.weight.dtype)


@functools.cache
def _face(wrapper: type, student: type) -> type:
    """The wrapper's class as a PreTrainedModel, if the student is one: by this Trainer tells how a model is saved.

    Every public and private name that a PreTrainedModel has and the wrapper has not is the student's.
    """
    base = next((kind for kind in student.__mro__ if kind.__name__ == "PreTrainedModel"), None)
    if base is None or issubclass(wrapper, base):
        return wrapper
    names = {name for name in set(dir(base)) - set(dir(wrapper)) if not name.startswith("__")}
    return type(wrapper.__name__, (wrapper, base), {name: _students(name) for name in names})


def _students(name: str) -> property:
    """The attribute `name` of the student."""
    return property(lambda self: getattr(self.student, name), lambda self, value: setattr(self.student, name, value))


def _of_student(state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if state_dict is None else {key.removeprefix(STUDENT): value for key, value in state_dict.items()}
