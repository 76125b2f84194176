"""Whether a trace of a few layers, with the others filled in, is the trace of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import shardc.capture.trace
from shardc.capture.skipped_layers import Watch
from shardc.capture.trace import capture
from shardc.ir.program import Program, Role


class Spy:
    """What captures did: whether a hole was filled, and why not."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.filled: list[range] = []
        self.refused: list[str] = []
        fill, refuse = shardc.capture.trace.fill, Watch.refuse

        def filling(program: Program, number: int, repeat: Any) -> Program:
            try:
                program = fill(program, number, repeat)
            except Exception as error:
                self.refused.append(str(error))
                raise
            self.filled.append(repeat.hole)
            return program

        def refusing(watch: Watch, reason: str) -> None:
            self.refused.append(reason)
            refuse(watch, reason)

        patch.setattr(shardc.capture.trace, "fill", filling)
        patch.setattr(Watch, "refuse", refusing)


def in_full(module: nn.Module, patch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> Program:
    """Capture twice, all layers traced the second time: the programs must be the same."""
    programs: list[Program] = []
    for patched in (False, True):
        with patch.context() as context:
            if patched:
                context.setattr(shardc.capture.trace, "find", lambda *_: [])
            programs.append(capture(module, args, kwargs, grad=torch.is_grad_enabled()))
    one, two = programs
    assert (one.inputs, one.outputs, one.out_leaves) == (two.inputs, two.outputs, two.out_leaves)
    assert (one.out_spec, one.tied, one.attached) == (two.out_spec, two.tied, two.attached)
    assert one.constants.keys() == two.constants.keys()
    one.graph.lint()
    for a, b in zip(one.graph.nodes, two.graph.nodes, strict=True):
        assert told(a) == told(b)
    return one


def told(node: fx.Node) -> Any:
    val = node.meta.get("val")
    values = val if isinstance(val, (tuple, list)) else [val]
    forms = [(v.shape, v.stride(), v.dtype, v.requires_grad) if isinstance(v, Tensor) else v for v in values]
    rest = {key: value for key, value in node.meta.items() if key != "val"}
    return node.op, str(node.target), node.name, str(node.args), str(node.kwargs), rest, forms


def check_values(program: Program, module: nn.Module, **kwargs: Any) -> None:
    """The loss and every gradient, as eager mode computes them."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    inputs = list(kwargs.values())
    given = [
        inputs[port.index] if port.role is Role.INPUT
        else torch.ones(()) if port.role is Role.TANGENT
        else (program.constants | state)[port.name]
        for port in program.inputs
    ]  # fmt: skip
    with torch.no_grad():
        results = fx.Interpreter(fx.GraphModule(nn.Module(), program.graph)).run(*given)
    output = module(**kwargs)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    for port, result in zip(program.outputs, results, strict=True):
        if port.role is Role.GRADIENT and result is not None:
            torch.testing.assert_close(result, module.get_parameter(port.name).grad)
