"""SparseGPT, GPTQ and Quantizer: the classes of the reference repositories, drop-in.

Scripts written for github.com/IST-DASLab/gptq and .../sparsegpt run unchanged: the published algorithms (no refit, no
clip beyond the quantizer's own), in place on the layer, on any device. New code should call `gptq` and `sparsegpt`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.solvers._checks import Pattern, check_damp, live
from llmkern.solvers.columns import BLOCK, gptq_columns, sparsegpt_columns
from llmkern.solvers.grid import Grid, find_grid
from llmkern.solvers.hessian import Hessian
from llmkern.solvers.solution import relative_loss


class Quantizer(nn.Module):
    """The weight quantizer of the reference repositories: `configure`, `find_params`, `quantize`.

    scale and zero are fp32 [N, 1]; codes are unsigned, in [0, maxq], and weight = scale * (code - zero). Symmetric
    scales are always 2 max|w| / maxq, also for rows without negative weights. mse=True takes the clip of least squared
    error. Activations (`weight=False`) and trits are not supported.
    """

    def __init__(self, shape: int = 1) -> None:
        super().__init__()
        self.register_buffer("maxq", torch.tensor(0))
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero", torch.zeros(shape))
        self.perchannel, self.sym, self.mse = False, True, False

    def configure(
        self, bits: int, perchannel: bool = False, sym: bool = True, mse: bool = False, norm: float = 2.4,
        grid: int = 100, maxshrink: float = 0.8, trits: bool = False,
    ) -> None:  # fmt: skip
        """Set the number of bits and the kind of grid. `norm`, `grid` and `maxshrink` are accepted and unused."""
        if trits or not 2 <= bits <= 8:
            raise ValueError(f"Quantizer: bits must be in 2..8 without trits, got {bits}{' and trits' * trits}")
        self.maxq = torch.tensor(2**bits - 1)
        self.perchannel, self.sym, self.mse = perchannel, sym, mse

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Find scale and zero of weight x [N, ...], one per row, or equal ones if not `perchannel`."""
        if not weight:
            raise ValueError("Quantizer: find_params is for weights only; pass weight=True")
        rows = x.detach().float().flatten(1) if self.perchannel else x.detach().float().reshape(1, -1)
        bits = round(math.log2(int(self.maxq) + 1))
        found = find_grid(
            rows.contiguous(), None, bits=bits, group_size=rows.shape[1], symmetric=self.sym,
            clip="mse" if self.mse else None,
        )  # fmt: skip
        shape = (len(x), *[1] * (x.ndim - 1))
        zero = 2 ** (bits - 1) + (torch.zeros_like(found.scales) if found.zeros is None else found.zeros)
        self.scale = found.scales.expand(len(x), 1).reshape(shape)
        self.zero = zero.float().expand(len(x), 1).reshape(shape)

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest values of the grid; x itself before `find_params`."""
        if not self.ready():
            return x
        codes = torch.clamp(torch.round(x / self.scale) + self.zero, 0, int(self.maxq))
        return self.scale * (codes - self.zero)

    def enabled(self) -> bool:
        """True once configured."""
        return int(self.maxq) > 0

    def ready(self) -> bool:
        """True once parameters are found."""
        return bool(torch.all(self.scale != 0))


class _LayerSolver:
    """A layer (nn.Linear, transformers' Conv1D, nn.Conv2d), the Hessian of its input, and its weight as [N, K]."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.transposed = any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)
        if not (self.transposed or isinstance(layer, (nn.Linear, nn.Conv2d))):
            raise TypeError(f"{self.name}: layer must be nn.Linear, Conv1D or nn.Conv2d, got {type(layer).__name__}")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"{self.name}: Conv2d with groups={layer.groups} has no single Hessian; wanted groups=1")
        weight = self._matrix()
        self.dev = weight.device
        self.rows, self.columns = weight.shape
        self.nsamples = 0
        self.hessian: Hessian | None = Hessian(self.columns, self.dev)
        self.loss = math.nan
        self.notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return type(self).__name__

    def add_batch(self, inp: Tensor, out: Tensor | None = None, blocksize: int = 1024) -> None:
        """Add one batch of the layer's input, with or without a batch dimension; `out`, `blocksize` are unused."""
        if self.hessian is None:
            raise ValueError(f"{self.name}: add_batch after free()")
        if isinstance(self.layer, nn.Conv2d):
            inp = inp.detach().float()
            inp = inp if inp.ndim == 4 else inp.unsqueeze(0)
            self.hessian.add(_patches(self.layer, inp).transpose(1, 2))
            self.nsamples += inp.shape[0]
            return
        self.hessian.add(inp)
        self.nsamples += 1 if inp.ndim <= 2 else inp.shape[0]

    def free(self) -> None:
        """Drop the Hessian."""
        self.hessian = None

    def _state(self) -> Hessian:
        if self.hessian is None:
            raise ValueError(f"{self.name}: solving after free()")
        if self.hessian.tokens == 0:
            raise ValueError(f"{self.name}: zero calibration tokens; call add_batch first")
        return self.hessian

    def _matrix(self) -> Tensor:
        weight = self.layer.weight.detach().float()  # type: ignore[operator]
        weight = weight.T if self.transposed else weight.flatten(1)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{self.name}: weights hold a NaN or an infinity")
        return weight.contiguous()

    def _write(self, q: Tensor) -> None:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        weight.data = (q.T if self.transposed else q).reshape(weight.shape).to(weight.dtype)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """[B, K, L]: what each output position of the convolution reads."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return nn.functional.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)


def _as_grid(quantizer: Any, group_size: int) -> Grid:
    """The found parameters of a Quantizer (ours or the reference's) as a grid of one group."""
    bits = math.log2(int(quantizer.maxq) + 1) if int(quantizer.maxq) > 0 else 0.0
    if bits not in range(2, 9):
        raise ValueError(f"quantizer: maxq must be 2^bits - 1 with bits in 2..8, got {int(quantizer.maxq)}")
    scales = quantizer.scale.detach().float().reshape(-1, 1).contiguous()
    zeros = (quantizer.zero.detach().reshape(-1, 1) - 2 ** (int(bits) - 1)).to(torch.int8).contiguous()
    return Grid(scales, zeros, group_size, int(bits))


def _find(quantizer: Any, values: Tensor) -> Grid:
    quantizer.find_params(values, weight=True)
    return _as_grid(quantizer, values.shape[1])


def _find_groups(quantizer: Any, w: Tensor, size: int) -> Grid:
    """The quantizer's parameters for every `size` columns of w [N, K]."""
    found = [_find(quantizer, w[:, at : at + size].contiguous()) for at in range(0, w.shape[1], size)]
    zeros = torch.cat([group.zeros for group in found if group.zeros is not None], 1)
    return Grid(torch.cat([group.scales for group in found], 1), zeros, size, found[0].bits)


class GPTQ(_LayerSolver):
    """GPTQ of one layer; set `quantizer` (a configured `Quantizer`) before `fasterquant`."""

    quantizer: Any

    def fasterquant(
        self, blocksize: int = BLOCK, percdamp: float = 0.01, groupsize: int = -1, actorder: bool = False,
        static_groups: bool = False,
    ) -> None:  # fmt: skip
        """Quantize the layer's weight in place; `loss`, `notes` and the quantizer's last parameters stay behind."""
        state = self._state()
        check_damp(self.name, percdamp)
        if groupsize != -1 and not 1 <= groupsize <= self.columns:
            raise ValueError(f"{self.name}: groupsize must be -1 or in [1, K={self.columns}], got {groupsize}")
        if getattr(self, "quantizer", None) is None:
            raise ValueError(f"{self.name}: set quantizer to a configured Quantizer before fasterquant")
        w = self._matrix()
        if not self.quantizer.ready():
            self.quantizer.find_params(w, weight=True)
        target = live(w, state)
        factor = state.factor("activation" if actorder else None, percdamp)
        size = self.columns if groupsize == -1 else groupsize
        dynamic = None
        if groupsize == -1:
            grid = _as_grid(self.quantizer, size)
        else:
            grid = _find_groups(self.quantizer, target, size)
            if not static_groups:
                dynamic = lambda values, places: _find_groups(self.quantizer, values, size)  # noqa: E731
        q, lost = gptq_columns(target, factor, grid, dynamic=dynamic, width=blocksize)
        self.loss, self.notes = relative_loss(w, q, state, lost), factor.notes
        self._write(q)


class SparseGPT(_LayerSolver):
    """SparseGPT of one layer; with a `quantizer` set, kept weights are quantized per row in the same pass."""

    quantizer: Any

    def fasterprune(
        self, sparsity: float, prunen: int = 0, prunem: int = 0, blocksize: int = BLOCK, percdamp: float = 0.01
    ) -> None:
        """Prune the layer's weight in place: a share `sparsity`, or `prunen` of every `prunem` columns.

        The share is met exactly (the reference prunes one weight more per block). `loss` and `notes` stay behind.
        """
        state = self._state()
        check_damp(self.name, percdamp)
        pattern = Pattern.parse(self.name, f"{prunen}:{prunem}" if prunen else sparsity)
        w = self._matrix()
        grid = None
        if getattr(self, "quantizer", None) is not None:
            if not self.quantizer.ready():
                self.quantizer.find_params(w, weight=True)
            grid = _as_grid(self.quantizer, self.columns)
        factor = state.factor(None, percdamp)
        q, _, lost = sparsegpt_columns(live(w, state), factor, pattern, grid, width=blocksize)
        self.loss, self.notes = relative_loss(w, q, state, lost), factor.notes
        self._write(q)
