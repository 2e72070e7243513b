"""OutputHessian: which errors of a layer's outputs the model's loss feels.

A layer's own squared error, tr(D H Dᵀ) with D = W - Q, takes all outputs for equally important and independent. The
loss of the whole model is, to second order and with Kronecker factors (K-FAC: Martens and Grosse, arXiv 1503.05671;
for rounding: YAQA, Tseng et al., arXiv 2505.22988), tr(O D H Dᵀ) with O = E[g gᵀ], g the gradient by the outputs. Rows
then are coupled as columns are: `solvers.coupled` rounds them, `solvers.refit` and `solvers.admm` solve for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.solvers.columns import blocks
from llmkern.solvers.hessian import Factor, Hessian

# Rows that are coupled; more would cost memory, N * PART numbers of every layer at once.
PART = 512
# Of the mean diagonal: gradients of a few thousand tokens, and the assumption of Kronecker factors, are rough. Of 0.1,
# 0.4, 1 and 3 this gave the least perplexity on a real model.
DAMP = 1.0


class OutputHessian:
    """Σ g gᵀ over tokens, fp32, for gradients g of N outputs; blocks of PART outputs, nothing between them."""

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        self.n = n
        self.places = blocks(n, PART)
        self.parts = [Hessian(at.stop - at.start, device) for at in self.places]

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return self.parts[0].tokens

    def to(self, device: torch.device) -> OutputHessian:
        """The same sums on another device; itself where they are there."""
        if device == self.parts[0].device:
            return self
        moved = OutputHessian(self.n, "meta")
        moved.parts = [Hessian.from_partial(part.partial().to(device), part.tokens) for part in self.parts]
        return moved

    def add(self, gradient: Tensor, *, rough: bool = False) -> None:
        """Add the tokens of gradient [..., N], any float dtype. ValueError for a NaN or infinity in it.

        rough: as for `Hessian.add`.
        """
        for at, part in zip(self.places, self.parts, strict=True):
            part.add(gradient[..., at], rough=rough)

    def damped(self, part: int) -> Tensor:
        """[P, P] of one block of outputs, damped."""
        return self.parts[part].damped(DAMP)

    def factor(self, part: int) -> Factor:
        """The Cholesky factor of one block of outputs, damped, in order of falling diagonal."""
        return self.parts[part].factor("activation", DAMP)


def check_output(name: str, output: OutputHessian | None, w: Tensor) -> None:
    """ValueError unless `output` fits w [N, K] and has seen tokens."""
    if output is None:
        return
    if output.n != len(w):
        raise ValueError(f"{name}: weight is [N, K]={list(w.shape)}, but output is of N={output.n}")
    if output.parts[0].device != w.device:
        raise ValueError(f"{name}: weight is on {w.device}, but output is on {output.parts[0].device}")
    if not output.tokens:
        raise ValueError(f"{name}: output has seen zero tokens")
