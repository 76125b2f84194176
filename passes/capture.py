"""Capture: a call of a model becomes a program: one graph of ATen operators, forward and backward.

def forward(self, x):                     %up_weight = input           f32[256, 64]
    return self.up(x).relu().sum()        %input_0 = input             f32[32, 64]
                                     ->   %permute = permute(%up_weight, [1, 0])
                                          %mm = mm(%input_0, %permute)
                                          %relu = relu(%mm)
                                          %sum_1 = sum(%relu)
                                          ...                          the gradient of up.weight
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from shardc.capture import trace
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.planning.constraints import module_constraints, parameter_demands

TRACING = threading.RLock()
"""Held by whoever runs this pass: for all threads, the model's tensors are fakes then, and flags of torch are set."""


@compiler_pass
def capture(c: Compilation) -> Compilation:
    """Trace the call, and find the parameters that constraints name. Raises CaptureError, ConstraintError."""
    call, constraints = c.call, c.options.constraints
    program = trace.capture(
        call.model,
        call.args,
        call.kwargs,
        grad=torch.is_grad_enabled(),
        called_with_grad=torch.is_grad_enabled() and call.grad,
        differentiable=call.differentiable,
        constraints=module_constraints(constraints, call.model),
        function=call.function,
        dynamic=c.dims,
        precision=c.options.precision,
        changing=call.changing,
    )
    demands = parameter_demands(program, call.model, constraints, c.mesh)
    return replace(c, call=call.without_arguments(), example=call.example(), program=program, demands=demands)
