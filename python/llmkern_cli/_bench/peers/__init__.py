"""Other libraries' products on this machine, one file each: how to build a layer, how to call it, and its class.

A peer whose library is missing, or that fails or is wrong at a shape, is a row with its reason. A new one is a file
with `PEERS` and its name in FILES.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern_cli._bench.candidate import KEPT, Candidate, row
from llmkern_cli._bench.weights import Rolled, Weights

FILES = (
    "torch_dense", "torch_packed", "torch_dynamic", "onnxruntime_matmul", "openvino_compressed", "ark", "xnnpack",
    "ggml", "torch_cuda", "torch_semi_structured", "humming_kernels", "gemlite_linear", "torchao_linear",
    "bitsandbytes_linear",
)  # fmt: skip
# The type of a weight's values by op; None is that of x.
VALUES = {
    "linear": None, "int4_linear": "int4", "int8_linear": "int8", "int8_dynamic_linear": "int8",
    "sparse24_linear": None,
}  # fmt: skip
EXACT = {"sparse24_linear": "sparse24"}  # of Weights.packed, where the op's values do not say it


def no_refusal(weights: Weights) -> str | None:
    """For peers that take every shape."""
    return None


@dataclass(frozen=True)
class Peer:
    """`build(rolled, dtype)` makes a layer, `bind(layer, x)` the call whose result is x [M, K] times its weight.

    op: the one of ours it stands against; needs: the packages, by the name they are imported as; refuses: why not at
    this shape, or None; most_copies: for layers that take long to build or much memory; group_size: of its own format,
    where that has one, or None; devices: where it runs; finish: see Candidate; exact: the weight [N, K] of the layer
    that it built, where it has values of its own.
    """

    name: str
    op: str
    build: Callable[[Rolled, torch.dtype], Any]
    bind: Callable[[Any, Tensor], Callable[[], Any]]
    activations: str = KEPT
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    needs: tuple[str, ...] = ()
    refuses: Callable[[Weights], str | None] = no_refusal
    most_copies: int = 1_000_000
    group_size: int | None = None
    devices: tuple[str, ...] = ("cpu",)
    finish: Callable[[Any, Any, Tensor], Tensor] | None = None
    exact: Callable[[Any], Tensor] | None = None


def candidates(weights: Weights, dtype: torch.dtype, names: tuple[str, ...] = FILES) -> Iterator[Candidate]:
    """Every peer of those files for the weights' device, at this shape and dtype of x; or its reason."""
    for name in names:
        found = importlib.import_module(f"llmkern_cli._bench.peers.{name}").PEERS
        for peer in (peer for peer in found if weights.device in peer.devices):
            yield _candidate(peer, weights, dtype)


def _candidate(peer: Peer, weights: Weights, dtype: torch.dtype) -> Candidate:
    n, k = weights.shape
    values = VALUES[peer.op]
    group_size = peer.group_size or {"int4": weights.group_size, "int8": k, None: None}[values]
    described = row(
        op=peer.op, peer=peer.name, shape=weights.shape, dtype=dtype, activations=peer.activations,
        group_size=group_size,
        values=values or str(dtype).removeprefix("torch."),
    )  # fmt: skip
    made = Candidate(
        described,
        dtype,
        lambda number: peer.build(weights.rolled(number), dtype),
        peer.bind,
        nbytes=_nbytes(values, n, k, group_size, dtype),
        multiplied=n * k,
        most_copies=peer.most_copies,
        finish=peer.finish,
    )
    if reason := _refusal(peer, weights, dtype):
        made.skip(reason)
        return made
    if peer.op == "sparse24_linear":  # what is left out is neither read nor multiplied: half, and two bits per value
        made.multiplied //= 2
        made.nbytes = made.nbytes // 2 + n * k // 8
    if peer.exact is None:
        made.exact = weights.exact(EXACT.get(peer.op) or values or "dense")
        return made
    try:
        made.layers = [peer.build(weights.rolled(0), dtype)]
        made.exact = peer.exact(made.layers[0])
    except Exception as error:  # a peer may fail in any way; that is its row
        made.skip(f"{type(error).__name__}: {error}"[:300])
    return made


def _refusal(peer: Peer, weights: Weights, dtype: torch.dtype) -> str | None:
    reasons = (_import_error(package) for package in peer.needs)
    if reason := next(filter(None, reasons), None):
        return reason
    if dtype not in peer.dtypes:
        takes = " or ".join(str(one).removeprefix("torch.") for one in peer.dtypes)
        return f"takes {takes}, not {str(dtype).removeprefix('torch.')}"
    return peer.refuses(weights)


def _import_error(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except Exception as error:  # an installed package may fail in any way
        return f"{package} cannot be imported: {error}"[:300]
    return None


def _nbytes(values: str | None, n: int, k: int, group_size: int | None, dtype: torch.dtype) -> int:
    """What one call must read: the values, and scales in two bytes."""
    if group_size is None:
        return n * k * dtype.itemsize
    return n * k // {"int4": 2, "int8": 1}[str(values)] + 2 * n * -(-k // group_size)


def whole_groups(weights: Weights) -> str | None:
    """For peers without a short last group."""
    n, k = weights.shape
    if k % weights.group_size or n % 16 or k % 32:
        return f"needs whole groups of {weights.group_size}, N % 16 == 0 and K % 32 == 0, got N x K = {n}x{k}"
    return None
