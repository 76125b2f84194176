"""Captured graphs against eager PyTorch: outputs, mutations, gradients, and what every node must say of itself."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shardc.capture.inputs import flatten
from shardc.capture.trace import capture
from shardc.ir.facts import captured, origin_of
from shardc.ir.program import Constant, Program, Role, value_of


def execute(program: Program, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run the captured graph on real values, tangents one: the user's output, the mutations and gradients by name."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    leaves, _ = flatten((args, kwargs))
    values: list[Tensor] = []
    for node, port in zip(program.placeholders, program.inputs, strict=True):
        if port.role is Role.INPUT:
            values.append(leaves[port.index])
        elif port.role is Role.TANGENT:
            values.append(torch.ones(value_of(node).shape, dtype=value_of(node).dtype))
        else:
            values.append(program.constants[port.name] if port.role is Role.CONSTANT else state[port.name])
        assert values[-1].shape == value_of(node).shape and values[-1].dtype == value_of(node).dtype
    with torch.no_grad():
        results = fx.Interpreter(fx.GraphModule(nn.Module(), program.graph)).run(*[v.detach().clone() for v in values])
    found: dict[Role, Any] = {Role.OUTPUT: {}, Role.MUTATION: {}, Role.GRADIENT: {}}
    for position, (port, value) in enumerate(zip(program.outputs, results, strict=True)):
        found[port.role][position if port.role is Role.OUTPUT else port.name] = value
    flat: list[Any] = [results[leaf] if isinstance(leaf, int) else None for leaf in program.out_leaves]
    assert program.effects is not None
    run = program.effects.run(flat, leaves, (args, kwargs), {})
    for position, leaf in enumerate(program.out_leaves):
        if not isinstance(leaf, int):
            flat[position] = leaf.value if isinstance(leaf, Constant) else leaf.make(run)
    flat = flat[: program.out_spec.num_leaves]
    return pytree.tree_unflatten(flat, program.out_spec), found[Role.MUTATION], found[Role.GRADIENT]


def eager(module: nn.Module, args: Any, kwargs: Any, chosen: Callable[[Tensor], bool]) -> Any:
    """The same from plain PyTorch, with a cotangent of ones for the chosen outputs."""
    module = copy.deepcopy(module)
    output = module(*args, **kwargs)
    roots = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor) and leaf.requires_grad and chosen(leaf)]
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return output, dict(module.named_buffers()), {name: p.grad for name, p in module.named_parameters()}


def verify(module: nn.Module, *args: Any, scalar: bool = True, **kwargs: Any) -> Program:
    """The captured graph gives the outputs, mutations and gradients of eager PyTorch, with the same random numbers."""
    module = module.double()
    program = capture(module, args, kwargs)
    program.graph.lint()
    torch.manual_seed(7)
    output, buffers, grads = eager(module, args, kwargs, lambda leaf: leaf.ndim == 0 if scalar else True)
    torch.manual_seed(7)
    got, mutations, got_grads = execute(program, module, args, kwargs)
    assert type(got) is type(output)
    for a, b in zip(flatten(got)[0], flatten(output)[0], strict=True):
        assert_same(a, b)
    for name, before in module.named_buffers():
        if name in mutations:
            assert_same(mutations[name], buffers[name])
        else:
            assert torch.equal(before, buffers[name]), name
    assert set(got_grads) == {n for n, p in module.named_parameters() if p.requires_grad}
    for name, grad in got_grads.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            assert_same(grad, grads[name])
    check_metadata(program)
    return program


def assert_same(a: Any, b: Any) -> None:
    if isinstance(b, Tensor):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)
    else:
        assert a == b


def check_metadata(program: Program) -> None:
    """Every value has its shape and place, positional arguments, a phase; forward does not depend on backward."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            assert node.op in ("placeholder", "output")
            continue
        place = captured(node).origin
        assert isinstance(place.module, str) and isinstance(place.source, str)
        name = str(node.target)
        assert not any(f".{word}." in name for word in ("detach", "alias", "t", "transpose", "reshape", "_unsafe_view"))
        assert "_assert" not in name and "lift_fresh" not in name
        if place.phase == "forward":
            assert all(user.op == "placeholder" or origin_of(user).phase == "forward" for user in node.all_input_nodes)
        if isinstance(node.target, torch._ops.OpOverload):
            assert set(node.kwargs) <= {a.name for a in node.target._schema.arguments if a.kwarg_only}


def operators(program: Program) -> Counter[str]:
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    return Counter(str(node.target) for node in calls)
