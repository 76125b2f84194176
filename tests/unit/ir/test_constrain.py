"""Constraints: how they are written, and where they stand in a captured graph."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks.captured import execute
from samples.small import Small, X
from shardc.capture.trace import capture
from shardc.errors import LayoutError
from shardc.ir.constrain import check, parse, serialise
from shardc.ir.facts import origin_of


def test_constrain_in_the_code_and_by_module_path() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = shardc.constrain(layer(x), ("dp", "?"))
            return x.sum()

    module = Net().double()
    assert shardc.constrain(X, ("dp", None)) is X
    program = capture(module, (X,), constraints={"layers.*": ("dp", ("sp", "tp"))})
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.shardc.constrain.default]
    found = Counter((n.args[1], origin_of(n).phase) for n in nodes)
    assert found == {(t, p): 2 for t in ("dp,?", "dp,(sp,tp)") for p in ("forward", "backward")}
    _, _, grads = execute(program, module, (X,), {})
    torch.testing.assert_close(grads["layers.1.bias"], torch.full((4,), 2.0, dtype=torch.float64))


def test_constraint_specs() -> None:
    spec = ("dp", None, "?", ("sp", "tp"))
    assert serialise(spec) == "dp,-,?,(sp,tp)" == serialise("dp, -, ?, (sp, tp)")
    assert parse(serialise(spec)) == (("dp",), (), None, ("sp", "tp"))
    assert serialise(()) == "" and parse("") == ()
    assert parse(serialise([("dp", "tp")])) == (("dp", "tp"),)
    with pytest.raises(LayoutError, match=r"2 entries but the tensor has 3 dims"):
        check("dp,-", 3, "constrain")
    with pytest.raises(LayoutError, match=r"uses axis 'dp' twice"):
        check("dp,(tp,dp)", 2, "constrain")
    with pytest.raises(LayoutError, match=r"no axis name"):
        serialise(("d p", None))
    with pytest.raises(LayoutError, match=r"constraint on inner: .* 1 entries but the tensor has 2 dims"):
        capture(Small(lambda self, y: y.sum()).double(), (X,), constraints={"inner": ("dp",)})


def test_a_printed_layout_is_a_spec() -> None:
    assert serialise("f32[8@dp, 4]") == serialise("[8@dp, 4]") == "[8@dp, 4]"
    assert parse("f32[(4@dp 512@tp), 64@(a,b), 3]") == (("dp", "tp"), ("a", "b"), ())
    assert shardc.constrain(X, "f64[3@dp, 4]") is X
    with pytest.raises(LayoutError, match=r"cannot leave a value in parts; leave out \+sum@tp"):
        serialise("f32[8@dp, 4] +sum@tp")
    with pytest.raises(LayoutError, match=r"cannot read layout"):
        serialise("f32[8@dp, 4")
    with pytest.raises(LayoutError, match=r"has 1 entries but the tensor has 2 dims"):
        check("f32[8@dp]", 2, "constrain")
