"""Layer solvers: choose the pruned or quantized weight of one layer from its weight and its input's Hessian.

Pure functions from weight [N, K] (any float dtype) and a Hessian (`Hessian`, or a [K, K] tensor of any positive scale)
to a `Solution`. They know no model: `llmkern.compress` walks one. `SparseGPT` and `GPTQ` are the classes of the
reference repositories, drop-in.
"""

from llmkern.solvers.gptq import gptq
from llmkern.solvers.hessian import Hessian
from llmkern.solvers.magnitude import magnitude
from llmkern.solvers.output import OutputHessian
from llmkern.solvers.problem import Problem
from llmkern.solvers.reference_api import GPTQ, Quantizer, SparseGPT
from llmkern.solvers.rtn import rtn
from llmkern.solvers.shift import InputShift, corrected
from llmkern.solvers.solution import Solution
from llmkern.solvers.sparsegpt import sparsegpt
from llmkern.solvers.wanda import wanda

__all__ = [
    "GPTQ",
    "Hessian",
    "InputShift",
    "OutputHessian",
    "Problem",
    "Quantizer",
    "Solution",
    "SparseGPT",
    "corrected",
    "gptq",
    "magnitude",
    "rtn",
    "sparsegpt",
    "wanda",
]
