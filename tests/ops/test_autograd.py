"""The short way of calls without a gradient gives what torch's way gives, and modes and tracing still see the op."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern import _autograd
from llmkern._registry import OPS


@pytest.fixture(params=["short", "torch's own"])
def cube(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch._ops.OpOverload]:
    """An op x -> x³ with a gradient, registered either way."""
    if request.param != "short":
        monkeypatch.delattr(torch._C, "_any_requires_grad")
    library = torch.library.Library("llmkern_test", "FRAGMENT")
    library.define("cube(Tensor x) -> Tensor")
    library.impl("cube", lambda x: x**3, "CompositeExplicitAutograd")
    torch.library.register_fake("llmkern_test::cube", torch.empty_like, lib=library)
    op = torch.ops.llmkern_test.cube.default
    _autograd.register(
        op, lambda x: x**3, library,
        backward=lambda ctx, dy: 3 * ctx.saved_tensors[0] ** 2 * dy,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )  # fmt: skip
    monkeypatch.undo()
    yield op
    library._destroy()


def test_both_ways_give_values_and_gradients(cube: torch._ops.OpOverload) -> None:
    x = torch.tensor([1.0, -2.0])
    assert torch.equal(cube(x), x**3)
    leaf = x.clone().requires_grad_()
    y = cube(leaf)
    y.sum().backward()
    assert torch.equal(leaf.grad, 3 * x**2)
    with torch.no_grad():
        assert not cube(leaf).requires_grad
    with torch.inference_mode():
        assert torch.equal(cube(x), x**3)
    torch.library.opcheck(cube, (leaf,))


def test_modes_still_see_the_op() -> None:
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Tensor:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    case = CASES["int8_linear"][3]
    args = case.args(torch.ones(2, case.k), None)
    with Record():
        y = OPS["int8_linear"](*args)
    assert OPS["int8_linear"].op in seen
    assert torch.equal(y, OPS["int8_linear"](*args))
