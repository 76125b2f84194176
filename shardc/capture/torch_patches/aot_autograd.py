"""AOTAutograd: the tracer that gives forward and backward as one graph, and how it describes the graph's ends.

    joint = joint_graph(stack, f, (w, x))     # %w, %x, %tangent -> (%y, %w_grad)
    output_kinds(joint.graph)                 # [("output", 0), ("gradient", 0)]

AOTAutograd is the only tracer that handles mutated inputs, several differentiable outputs and views at once. Its public
functions compile what they trace; capture needs the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn

# The state of CUDA's generator for a switch of torch's compilers that is off here (`functionalize_rng_ops`).
from torch._decomp.decompositions_for_rng import PhiloxStateTracker

# AOTAutograd marks placeholders and outputs with these classes, in `meta["desc"]`. It says nowhere else what they are.
from torch._functorch._aot_autograd import descriptors

# The only entry to AOTAutograd that stops at the joint graph: the public ones partition and compile it.
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

# What torch's compilers use: the Python code of a graph is written when somebody asks for it, which nobody does here.
# torch keeps all such code for as long as the process runs.
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from shardc.capture.torch_patches.result_checks import replace_checks
from shardc.errors import CaptureError


def joint_graph(stack: ExitStack, function: Callable[..., Any], args: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The functional ATen graph of `function` and, where something requires a gradient, of its backward.

    What AOTAutograd enters stays entered until `stack` closes. Raises CaptureError for an operator whose effects a
    sharded program cannot have, and whatever the tracer or the model raises.
    """
    # Every trace would begin and end with new tensors for a state that nothing reads, which takes as long as planning.
    stack.enter_context(patch.object(PhiloxStateTracker, "reset", lambda: None))
    stack.enter_context(_use_lazy_graph_module(True))
    wrapper = _TracedFunction(function)
    joint = aot_export_joint_with_descriptors(
        stack,
        wrapper,
        tuple(args),
        decompositions={},
        _disable_torch_fn_metadata_mode=True,  # it notes the torch function of every operator, which nothing here reads
    )
    replace_checks(joint.graph_module)
    return joint.graph_module


class _TracedFunction(nn.Module):
    """A function as a module, which is all that AOTAutograd traces. Hooks on all modules do not see it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    forward = __call__


def input_index(placeholder: fx.Node) -> int | None:
    """The position among the traced function's arguments, or None for a tangent."""
    end = placeholder.meta["desc"]
    return end.idx if isinstance(end, descriptors.PlainAOTInput) else None


def tangent_index(placeholder: fx.Node) -> int | None:
    """The position of the output whose tangent this is, or None if it is the tangent of something else."""
    end = placeholder.meta["desc"]
    if isinstance(end, descriptors.TangentAOTInput) and isinstance(end.output, descriptors.PlainAOTOutput):
        return end.output.idx
    return None


def drop_tangents(graph: fx.Graph, parameters: Collection[int]) -> None:
    """Take out the tangents of what the arguments numbered `parameters` are overwritten by, in place.

    A leaf is overwritten under no_grad, so its new value is a leaf again, and no gradient comes back from it.
    AOTAutograd asks for one, and adds it to the gradient of the old value.
    """
    for node in list(graph.nodes):
        end = node.meta.get("desc") if node.op == "placeholder" else None
        if not (isinstance(end, descriptors.TangentAOTInput) and _written(end.output) in parameters):
            continue
        for user in list(node.users):
            if user.target is torch.ops.aten.add.Tensor and not user.kwargs:
                user.replace_all_uses_with(next(operand for operand in user.args if operand is not node))  # type: ignore[arg-type]
                graph.erase_node(user)
        if node.users:
            value = node.meta["val"]
            with graph.inserting_after(node):
                zeros = graph.call_function(torch.ops.aten.zeros.default, (list(value.shape),), {"dtype": value.dtype})
            zeros.meta = {"val": value}
            node.replace_all_uses_with(zeros)
        graph.erase_node(node)


def _written(end: object) -> int:
    """The argument that an output overwrites; -1 for other outputs."""
    return _argument(end.mutated_input) if isinstance(end, descriptors.InputMutationAOTOutput) else -1


def output_kinds(graph: fx.Graph) -> list[tuple[str, int]]:
    """What each element of the output tuple is, with a position: ("output", i) is the i-th output, ("mutation", i) and
    ("gradient", i) are those of the i-th argument, ("", 0) is anything else. Raises CaptureError for an argument of an
    unknown kind."""
    kinds: list[tuple[str, int]] = []
    for end in graph.output_node().meta["desc"]:
        if isinstance(end, descriptors.PlainAOTOutput):
            kinds.append(("output", end.idx))
        elif isinstance(end, descriptors.InputMutationAOTOutput):
            kinds.append(("mutation", _argument(end.mutated_input)))
        elif isinstance(end, descriptors.GradAOTOutput):
            kinds.append(("gradient", _argument(end.grad_of)))
        else:
            kinds.append(("", 0))
    return kinds


def _argument(end: object) -> int:
    """The position of the argument that a descriptor names."""
    if not isinstance(end, descriptors.PlainAOTInput):
        raise CaptureError(
            f"torch {torch.__version__} traced an input of kind {type(end).__name__}, which shardc does not know; "
            f"install a version of torch that it is tested with (constraints.txt)"
        )
    return end.idx
