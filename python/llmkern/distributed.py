"""Ranks of torch.distributed that compress one model together: who calibrates on what, who solves what, who has it.

Every rank holds the model, or streams it from the same files, and gets the whole calibration. A rank runs its share of
the batches through a stage, the Hessians are added up on the ranks that solve with them, layers are solved side by
side, and every rank gets every result, so that all go on with the same model. Rank 0 writes. Hessians are sums, so one
rank and several give the same model up to the order of summation.

What fails on one rank fails on all, with that rank's message; a rank that has died or hangs is an error within the
process group's timeout.
"""

from __future__ import annotations

import datetime
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkern.blocks import Call
from llmkern.fisher import Sensitivity
from llmkern.nn import dense_weight
from llmkern.shared_inputs import SharedInputs
from llmkern.solved import Solved, decode, encode
from llmkern.solvers import Hessian, InputShift, OutputHessian
from llmkern.streaming import home_of, read_bias

T = TypeVar("T")
# What a rank may raise and the others can raise as well; anything else ends the rank, which ends the others.
ERRORS = (FileExistsError, BlockingIOError, NotImplementedError, ValueError, TypeError, RuntimeError, OSError)


# How long a rank that says nothing is waited for: ranks solve layers of very different sizes between two exchanges.
PATIENCE = datetime.timedelta(minutes=30)


class Group(NamedTuple):
    """Layers of one input by name, and the rank that solves each. hessian: None without data, and on other ranks.
    shift: None where it was not collected, or not for all tokens of the Hessian.

    Names, so that a dense layer can go when it is replaced.
    """

    names: list[str]
    hessian: Hessian | None
    owners: Mapping[str, int] = MappingProxyType({})
    shift: InputShift | None = None


class Alone:
    """One process."""

    rank, size = 0, 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def share(self, calls: list[Call]) -> list[Call]:
        """The batches that this rank calibrates on."""
        return calls

    def check_same(self, parts: Callable[[], dict[str, Any]]) -> None:
        """Nobody could differ."""

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0."""
        return work()

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank."""
        return [work()]

    def jointly(self, work: Callable[[], T]) -> T:
        """What `work` gives here; it fails on every rank if it fails on one."""
        return work()

    def groups(self, shared: SharedInputs) -> list[Group]:
        """The layers by their input, those that never ran last, with the Hessians of all batches."""
        return [_group(names, shared.hessian(names[0]), shared.shift(names[0])) for names in _by_leader(shared)]

    def add_up(self, found: Sensitivity) -> None:
        """What all ranks have gathered, on every rank."""
        found.settle([found.totals()])

    def data_free(self, parts: list[list[str]]) -> list[Group]:
        """These layers as groups without data."""
        return [Group(part, None) for part in parts]

    def solve(self, groups: list[Group], solve: Callable[[Group], dict[str, Solved]]) -> Iterator[dict[str, Solved]]:
        """The results of all groups in their order; a group (and its Hessian) goes when it is solved."""
        while groups:
            yield solve(groups.pop(0))


class Team(Alone):
    """The ranks of the default process group."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # gloo carries CPU tensors, nccl those of GPUs only.
        gloo = "gloo" in str(dist.get_backend_config())
        self._wire = torch.device("cpu") if gloo else torch.device("cuda", torch.cuda.current_device())

    def share(self, calls: list[Call]) -> list[Call]:
        """Every `size`-th batch; none where there are fewer batches than ranks."""
        return calls[self.rank :: self.size]

    def check_same(self, parts: Callable[[], dict[str, Any]]) -> None:
        """ValueError unless all ranks are about to do the same."""
        from llmkern.fingerprint import differences

        first, *others = self.each(parts)
        for rank, other in enumerate(others, 1):
            if differ := differences(first, other):
                text = "; ".join(differ[:3]).replace("there", "on rank 0").replace("here", f"on rank {rank}")
                raise ValueError(f"compress: ranks must be given the same: {text}")

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, sent to every rank; its error too."""
        sent: list[Any] = [_attempt(work) if self.rank == 0 else None]
        with self._together():
            dist.broadcast_object_list(sent, src=0, device=self._wire)
        return self._value(0, sent[0])

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, by rank; the first rank's error where there is one."""
        mine, got = _attempt(work), [("", None)] * self.size
        with self._together():
            dist.all_gather_object(got, mine)
        return [self._value(rank, outcome) for rank, outcome in enumerate(got)]

    def jointly(self, work: Callable[[], T]) -> T:
        """What `work` gives here, which need not be anything that can be sent."""
        kept: list[T] = []
        self.each(lambda: kept.append(work()))
        return kept[0]

    def groups(self, shared: SharedInputs) -> list[Group]:
        """As alone, each Hessian on its owner only. Layers share one if they did on every rank that ran them."""
        leaders = self.each(lambda: {name: names[0] for names in _by_leader(shared) for name in names})
        ran = self.each(lambda: [name for name, tokens in shared.tokens.items() if tokens])
        together: dict[tuple, list[str]] = {}
        for name in dict.fromkeys(name for found in leaders for name in found):
            inputs = tuple(found[name] if name in ran[rank] else None for rank, found in enumerate(leaders))
            together.setdefault(inputs, []).append(name)
        return [
            _group(
                names,
                self._reduced(shared.hessian(names[0]), names[0], owners),
                self._reduced_shift(shared.shift(names[0]), names[0], owners) if shared.with_shifts else None,
                owners,
            )
            for names, owners in zip(together.values(), self._owners(together.values()), strict=True)
        ]

    def add_up(self, found: Sensitivity) -> None:
        """The sums over all ranks, of a layer at a time."""
        for name, size in found.sizes.items():
            output = found.outputs.get(name) or OutputHessian(size, self._wire)
            output.parts = [self._summed(part, set(range(self.size))) for part in output.parts]
            found.outputs[name] = output
        found.settle(self.each(found.totals))

    def data_free(self, parts: list[list[str]]) -> list[Group]:
        """As alone, shared out by size."""
        owners = self._owners(parts, factor=False)
        return [Group(part, None, of) for part, of in zip(parts, owners, strict=True)]

    def solve(self, groups: list[Group], solve: Callable[[Group], dict[str, Solved]]) -> Iterator[dict[str, Solved]]:
        """Each layer on its owner, all owners at once; every rank then gets every result."""
        mine: dict[int, dict[str, Solved]] = {}
        packets: dict[int, bytes] = {}

        def work() -> dict[int, int]:
            for at, group in enumerate(groups):
                own = [name for name in group.names if group.owners[name] == self.rank]
                if own:
                    mine[at] = solve(group._replace(names=own))
                    packets[at] = encode(mine[at])
                # Here, where an error still reaches all: `decode` needs them.
                for name in group.names:
                    read_bias(self.model.get_submodule(name))
            return {at: len(packet) for at, packet in packets.items()}

        sizes = self.each(work)
        for at, group in enumerate(groups):
            solved = mine.pop(at, {})
            for owner in sorted(set(group.owners.values())):
                packet = self._broadcast(packets.pop(at, None) if owner == self.rank else None, sizes[owner][at], owner)
                if owner != self.rank:
                    theirs = [name for name in group.names if group.owners[name] == owner]
                    solved |= decode(packet, {name: self.model.get_submodule(name) for name in theirs})
            yield {name: solved[name] for name in group.names}

    def _owners(self, groups: Iterable[list[str]], *, factor: bool = True) -> list[dict[str, int]]:
        shapes = [{name: dense_weight(self.model.get_submodule(name)).shape for name in names} for names in groups]
        return share_out(shapes, self.size, factor=factor)

    def _reduced(self, hessian: Hessian | None, name: str, owners: Mapping[str, int]) -> Hessian | None:
        """The Hessian of the layer `name` over the batches of all ranks, on those that own a layer of its group."""
        layer = self.model.get_submodule(name)
        wanted = set(owners.values())
        total = self._summed(hessian or Hessian(dense_weight(layer).shape[1], home_of(layer)), wanted)
        return total if self.rank in wanted and total.tokens else None

    def _reduced_shift(self, shift: InputShift | None, name: str, owners: Mapping[str, int]) -> InputShift:
        """As `_reduced`, of how the layer's inputs differ from the dense model's."""
        layer = self.model.get_submodule(name)
        total = shift or InputShift(dense_weight(layer).shape[1], home_of(layer))
        total.sum, total.tokens = self._total(total.sum, total.tokens, set(owners.values()))
        return total

    def _summed(self, mine: Hessian, wanted: set[int]) -> Hessian:
        """The sum over all ranks; on ranks that are not `wanted` it may be anything."""
        return Hessian.from_partial(*self._total(mine.partial(), mine.tokens, wanted))

    def _total(self, mine: Tensor, count: int, wanted: set[int]) -> tuple[Tensor, int]:
        """A matrix, which may be overwritten, and a number of tokens, each summed over all ranks."""
        total = mine
        if f"{total.device.type}:" not in str(dist.get_backend_config()):
            total = total.to(self._wire)
        tokens = torch.tensor(count, device=total.device)
        with self._together():
            for part in (total, tokens):
                if len(wanted) == 1:
                    dist.reduce(part, min(wanted))
                else:
                    dist.all_reduce(part)
        return total.to(mine.device), int(tokens)

    def _broadcast(self, data: bytes | None, size: int, source: int) -> bytes:
        packet = torch.frombuffer(bytearray(data or size), dtype=torch.uint8).to(self._wire)
        with self._together():
            dist.broadcast(packet, source)
        return packet.cpu().numpy().tobytes()

    def _value(self, rank: int, outcome: tuple[str, Any]) -> Any:
        kind, value = outcome
        if kind:
            error = next(error for error in ERRORS if error.__name__ == kind)
            raise error(value if rank == self.rank else f"{value} (rank {rank})")
        return value

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around what all ranks do at once: here a rank learns that another is gone."""
        try:
            yield
        except RuntimeError as error:
            # What it says after the place in its source and before its advice.
            said = re.sub(r"^\[[^]]*\d\] ", "", str(error).strip()).split(". ")[0].split("\n")[0]
            rank = f"rank {self.rank} of {self.size}"
            raise RuntimeError(f"compress: {rank}: another rank has ended or hangs: {said}") from error


@contextmanager
def joined() -> Iterator[tuple[int, torch.device | None]]:
    """Inside, this process is in the group that torchrun's environment variables describe; its rank and its GPU.

    Rank 0 and no device where torchrun did not start it, or alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        yield 0, None
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Functions here have the default group as a default argument. Imported inside, as transformers does, they keep it
    # and gloo's threads for good, and one that still drops a tensor while the interpreter ends aborts the process
    # (pytorch#190489).
    importlib.import_module("torch.distributed.nn")
    importlib.import_module("torch.distributed.fsdp")
    dist.init_process_group("gloo" if device is None else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()


def team(model: nn.Module) -> Alone:
    """The ranks of an initialized process group of several, else this process."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Team(model) if several else Alone(model)


def share_out(groups: Sequence[Mapping[str, Sequence[int]]], size: int, *, factor: bool = True) -> list[dict[str, int]]:
    """An owner for each layer of each group, given by shapes (N, K), so that ranks are done at about the same time.

    A layer costs K² N, and a rank's first layer of a group K³/3 more for the factor, where there is one; without, N K.
    Groups stay whole unless that takes a tenth longer: experts are enough to go round, gate and up are not.
    """
    whole = _assign([(at, list(group)) for at, group in enumerate(groups)], groups, size, factor)
    split = _assign([(at, [name]) for at, group in enumerate(groups) for name in group], groups, size, factor)
    return whole[0] if whole[1] <= 1.1 * split[1] else split[0]


def _assign(
    items: list[tuple[int, list[str]]], shapes: Sequence[Mapping[str, Sequence[int]]], size: int, factor: bool
) -> tuple[list[dict[str, int]], float]:
    """Owners of these pieces of groups, dearest first to the rank that is then the least loaded; the largest load."""
    load, owners = [0.0] * size, [dict.fromkeys(group, 0) for group in shapes]
    paid: set[tuple[int, int]] = set()

    def cost(at: int, names: list[str]) -> float:
        return float(sum(shapes[at][name][0] * shapes[at][name][1] ** (2 if factor else 1) for name in names))

    for at, names in sorted(items, key=lambda item: -cost(*item)):
        first = max(k for _, k in shapes[at].values()) ** 3 / 3 if factor else 0.0
        loads = [before + cost(at, names) + first * ((at, rank) not in paid) for rank, before in enumerate(load)]
        owner = loads.index(min(loads))
        load[owner] = loads[owner]
        owners[at] |= dict.fromkeys(names, owner)
        paid.add((at, owner))
    return owners, max(load)


def _by_leader(shared: SharedInputs) -> list[list[str]]:
    """The names of the layers of each input, those that never ran last, each by itself."""
    found = list(shared.shared_by().values())
    for names in found:
        for name in names:
            shared.hessian(name)  # raises where layers shared their input in some batches only
    ran = {name for names in found for name in names}
    return [*found, *([name] for name in shared.tokens if name not in ran)]


def _group(
    names: list[str], hessian: Hessian | None, shift: InputShift | None,
    owners: Mapping[str, int] = MappingProxyType({}),
) -> Group:  # fmt: skip
    """A group whose shift, if any, is of all tokens."""
    known = hessian is not None and shift is not None and shift.tokens == hessian.tokens
    return Group(names, hessian, owners, shift if known else None)


def _attempt(work: Callable[[], Any]) -> tuple[str, Any]:
    """("", value), or the name of an error and its text."""
    try:
        return "", work()
    except ERRORS as error:
        return next(kind.__name__ for kind in ERRORS if isinstance(error, kind)), str(error)
