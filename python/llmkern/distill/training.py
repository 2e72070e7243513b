"""The plain loop behind `llmkern distill`: AdamW, a warm-up and a cosine, and a state from which it goes on."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._progress import Progress
from llmkern._version import __version__
from llmkern.distill.teacher_cache import TeacherCache
from llmkern.distill.wrapper import DistillWrapper
from llmkern.fingerprint import about_model, digest_of
from llmkern.state import State

CALLER = "distill"
COLUMNS = ("loss", "divergence", "cross_entropy", "agreement")
BETAS = (0.9, 0.95)
LEAST_RATE = 0.1  # of the largest learning rate, at the end of the cosine
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """Of a run of the loop. rate: the largest learning rate; warmup: the share of steps until it is reached; clip: the
    largest norm of the gradient; dtype: what products are computed in, the student's parameters stay in theirs.
    """

    steps: int
    batch: int = 4
    rate: float = 1e-4
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for what makes no sense."""
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{CALLER}: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{CALLER}: {name} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"{CALLER}: warmup must be a share in [0, 1), got {self.warmup}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{CALLER}: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


def rate_at(step: int, settings: Settings) -> float:
    """The learning rate of a step from 0: linear up to the largest, then half a cosine down to a tenth of it."""
    rising = math.ceil(settings.warmup * settings.steps)
    if step < rising:
        return settings.rate * (step + 1) / rising
    done = (step - rising) / max(settings.steps - rising, 1)
    return settings.rate * (LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def windows_at(step: int, count: int, settings: Settings) -> Tensor:
    """int64 [batch]: which of `count` windows a step takes: all of them in a new random order, again and again."""
    found = []
    for at in range(step * settings.batch, (step + 1) * settings.batch):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + at // count)
        found.append(int(torch.randperm(count, generator=generator)[at % count]))
    return torch.tensor(found)


def train(
    wrapper: DistillWrapper, windows: Tensor, settings: Settings, *, masks: Any = None,
    state_dir: str | Path | None = None, save_seconds: float = 300, progress: bool = True,
) -> list[dict[str, float]]:  # fmt: skip
    """Train the wrapper's student in place on token windows int64 [n, L]; of each step loss, divergence, and so on.

    masks: a `prune.MaskSet` of the student, which then keeps its zeros. state_dir: a folder in which parameters,
    moments and the state of random numbers are kept every save_seconds; the same call goes on from there, and ends with
    the same bits as a run that was not stopped.

    Raises ValueError for windows that are none, or a state of another run; FloatingPointError when the loss is no
    longer finite; what `State` and `DistillWrapper` raise.
    """
    if windows.ndim != 2 or not windows.numel():
        raise ValueError(f"{CALLER}: windows must be token ids [n, L] with n, L > 0, got {list(windows.shape)}")
    student = wrapper.student
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, betas=BETAS, weight_decay=settings.weight_decay)
    state = None if state_dir is None else State(state_dir, _fingerprint(wrapper, windows, settings), argument=CALLER)
    torch.manual_seed(settings.seed)
    history: list[list[float]] = []
    try:
        if state is not None and state.parts:
            history = _restore(state, student, optimizer)
        if masks is not None:
            masks.attach(optimizer)
        saved = time.monotonic()
        bar = Progress("distill", settings.steps, progress)
        bar.step("resumed" if history else "", len(history))
        wrapper.train()
        for step in range(len(history), settings.steps):
            history.append(_step(wrapper, optimizer, windows, step, settings))
            bar.step(f"loss {history[-1][0]:.4f}, {100 * history[-1][3]:.1f} % of tokens as the teacher's")
            if state is not None and step + 1 < settings.steps and time.monotonic() - saved >= save_seconds:
                _keep(state, student, optimizer, history)
                saved = time.monotonic()
    except KeyboardInterrupt:  # within a step nothing is whole that could be kept
        kept = (
            "" if state is None or not state.parts else f"{state.parts[-1]} is kept in {state.folder}: --resume goes on"
        )
        raise KeyboardInterrupt(kept) from None
    finally:
        if state is not None:
            state.close()
        if masks is not None:
            masks.detach()
    wrapper.eval()
    return [dict(zip(COLUMNS, row, strict=True)) for row in history]


def _step(
    wrapper: DistillWrapper, optimizer: torch.optim.Optimizer, windows: Tensor, step: int, settings: Settings
) -> list[float]:
    """One step; COLUMNS of it."""
    device = next(wrapper.parameters()).device
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, settings)
    with torch.autocast(device.type, torch.bfloat16) if settings.dtype == "bfloat16" else nullcontext():
        found = wrapper(input_ids=windows[windows_at(step, len(windows), settings)].to(device))
    row = [float(found[name].detach()) for name in COLUMNS]
    if not math.isfinite(row[0]):
        raise FloatingPointError(f"{CALLER}: the loss of step {step} is {row[0]}; a smaller rate may help")
    optimizer.zero_grad(set_to_none=True)
    found["loss"].backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], settings.clip)
    optimizer.step()
    return row


def _fingerprint(wrapper: DistillWrapper, windows: Tensor, settings: Settings) -> dict[str, Any]:
    teacher = wrapper.teacher
    return {
        "llmkern": __version__,
        "torch": torch.__version__,
        "student": about_model(wrapper.student),
        "teacher": teacher.fingerprint if isinstance(teacher, TeacherCache) else about_model(teacher),
        "windows": digest_of(windows),
        "settings": asdict(settings),
        "loss": wrapper.settings,
    }


def _keep(state: State, student: nn.Module, optimizer: torch.optim.Optimizer, history: list[list[float]]) -> None:
    """Make what the next step needs durable, in the place of what was kept before."""
    tensors = {f"student.{name}": tensor for name, tensor in _tensors(student).items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors["history"] = torch.tensor(history, dtype=torch.float64)
    state.write_tensors(f"step {len(history)}", tensors, alone=True)


def _restore(state: State, student: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """Put what `_keep` kept last where it was; the history of the steps that are done."""
    from safetensors.torch import load_file

    tensors = load_file(state.path(state.parts[-1]))
    with torch.no_grad():
        for name, tensor in _tensors(student).items():
            tensor.copy_(tensors[f"student.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return tensors["history"].tolist()


def _tensors(student: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones once."""
    return {**dict(student.named_parameters()), **dict(student.named_buffers())}
