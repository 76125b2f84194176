"""From the traced graph to the `Program`: canonical operators, ports for inputs and results, provenance, phases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from shardc.capture import canonical, provenance
from shardc.capture.inputs import (
    refuse_foreign,
    refuse_promoted,
    refuse_seeded,
    refuse_shared,
    refuse_sparse,
)
from shardc.capture.model_trace import ModelTrace
from shardc.capture.repeated_layers import Unlike, form
from shardc.capture.side_effects.holders import Location
from shardc.capture.torch_patches.aot_autograd import drop_tangents, input_index, output_kinds, tangent_index
from shardc.capture.torch_patches.attention.written import WEIGHTS
from shardc.capture.torch_patches.fake_tensors import fake_like, is_fake
from shardc.errors import CaptureError
from shardc.ir.facts import Origin
from shardc.ir.program import Port, Program, Role
from shardc.ir.versions import GraphVersion

_ZEROS = torch.ops.aten.zeros.default


class ProgramBuilder:
    """Makes the Program of one trace. Raises CaptureError for what a program cannot hold."""

    def __init__(self, trace: ModelTrace, traced: fx.GraphModule) -> None:
        self.trace, self.traced = trace, traced
        drop_tangents(
            traced.graph, {i for i, slot in enumerate(trace.visible_slots) if slot.port.role is Role.PARAMETER}
        )
        self.origins: dict[fx.Node, Origin] = {}
        self.rewriter = canonical.Rewriter(self.origins)
        self.inputs: list[Port] = []
        self.constants: dict[str, Tensor] = {}
        self.standing: dict[str, Location] = {}
        """Where those of the constants stand that something holds."""

    def program(self) -> Program:
        """The canonical program, with the ports of its inputs and results."""
        graph = self.traced.graph
        ports, values = self._results()
        self.written = {port.name for port in ports if port.role is Role.MUTATION}
        nodes = canonical.live(graph, values)
        # not those of masks, of which more is known when the graph is whole
        self.trace.recognition.check(node for node in nodes if node.target is WEIGHTS)
        self._placeholders(nodes)
        used = {port.name for port in self.inputs}
        refuse_shared(self.written, [(name, tensor) for name, tensor in self.trace.tensors() if name in used])
        self.origins |= provenance.located(nodes, provenance.by_sequence(graph))
        refuse_sparse(nodes, self.origins)
        refuse_promoted(nodes, self.origins)
        refuse_seeded(nodes, self.origins, self.trace.provenance.after_seed)
        self.rewriter.copy(nodes)
        results = [None if value is None else self.rewriter.env[value] for value in values]
        new = self.rewriter.finish(results)
        new_results: Any = new.output_node().args[0]
        provenance.mark_phases(
            new, [r for r, port in zip(new_results, ports, strict=True) if port.role is not Role.GRADIENT]
        )
        return Program(
            GraphVersion.of(new),
            self.inputs,
            ports,
            self.trace.outputs.spec,
            self.trace.outputs.leaves,
            constants=self.constants,
            tied=dict(self.trace.state.tied),
            attached=frozenset(self.trace.outputs.attached),
            standing=self.standing,
            effects=self.trace.recorded(self.standing),
        )

    def _results(self) -> tuple[list[Port], list[fx.Node | None]]:
        """Outputs, then mutations, then gradients, with their ports."""
        roles = (Role.OUTPUT, Role.MUTATION, Role.GRADIENT)
        by_role: dict[Role, list[tuple[Port, fx.Node | None]]] = {role: [] for role in roles}
        graph, gradients = self.traced.graph, dict[Port, fx.Node | None]()
        for (kind, index), value in zip(output_kinds(graph), pytree.tree_leaves(graph.output_node().args), strict=True):
            if kind == "output":
                by_role[Role.OUTPUT].append((Port(Role.OUTPUT, "", index), _uncloned(value)))
            elif kind:
                source, role = self.trace.visible_slots[index], Role(kind)
                if role is Role.GRADIENT:
                    gradients[source.port] = value
                else:
                    by_role[role].append((Port(role, source.port.name, source.port.index), value))
        written = {(port.name, port.index) for port, _ in by_role[Role.MUTATION]}
        for slot in self.trace.slots:
            if slot.fake.requires_grad and gradients:
                port = Port(Role.GRADIENT, slot.port.name, slot.port.index)
                gradient = gradients.get(slot.port)
                if (port.name, port.index) in written and gradient is not None and gradient.target is _ZEROS:
                    gradient = None  # that of the new value, which torch's tracer begins backward with
                by_role[Role.GRADIENT].append((port, gradient))
        pairs = [pair for group in by_role.values() for pair in group]
        return [port for port, _ in pairs], [value for _, value in pairs]

    def _placeholders(self, nodes: list[fx.Node]) -> None:
        left = {self._port(old): old for old in self.traced.graph.nodes if old.op == "placeholder"}
        like = {form(slot.fake): left[slot.port].meta["val"] for slot in self.trace.visible_slots if self.trace.hides}
        needed = {operand for node in nodes for operand in node.all_input_nodes}
        for slot in self.trace.slots:
            old = left.pop(slot.port, None)
            if slot.port.role is Role.CONSTANT:
                if old not in needed and slot.port.name not in self.written:
                    continue
                self.constants[slot.port.name] = slot.places[0].get()
                self.standing[slot.port.name] = slot.places[0]
            self._input(slot.port, old, old.meta["val"] if old else like[form(slot.fake)])
        for port, old in left.items():
            self._input(port, old, old.meta["val"])
        for old in self.traced.graph.nodes:
            if old.op == "get_attr" and old in needed:
                self._constant(old)

    def _input(self, port: Port, old: fx.Node | None, value: Any) -> None:
        self.inputs.append(port)
        self.rewriter.placeholder(old, _identifier(port), value)

    def _port(self, old: fx.Node) -> Port:
        index = input_index(old)
        if index is not None:
            return self.trace.visible_slots[index].port
        output = tangent_index(old)
        if output is None:
            raise CaptureError(
                f"the graph asks for the gradient of {old.meta['desc']}: a buffer or an input is overwritten by a "
                "value that requires a gradient; write it under torch.no_grad(), or detach the value"
            )
        return Port(Role.TANGENT, "", output)

    def _constant(self, old: fx.Node) -> None:
        value = self.traced
        for part in str(old.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Generator):
            raise CaptureError(
                "the model draws from a torch.Generator; a sharded run draws from torch's default one. "
                "Leave out generator=, or draw outside of the model and pass the tensor in"
            )
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"the graph holds {old.target}, a {type(value).__name__}: torch.cond and the like are not supported"
            )
        if self.trace.hides and is_fake(value):
            raise Unlike("a tensor of a layer that is skipped is used elsewhere")
        refuse_foreign(value, self.trace.state.reachable.tensors.get(id(value), ()))
        name = f"constant:{len(self.trace.state.standing) + len(self.constants) - len(self.standing)}"
        self.constants[name] = value
        if "val" not in old.meta:
            old.meta["val"] = fake_like(self.trace.mode, value)
        self.inputs.append(Port(Role.CONSTANT, name))
        self.rewriter.placeholder(old, name.replace(":", "_"), old.meta["val"])


def _uncloned(value: fx.Node) -> fx.Node:
    """An output without the copy that `_flat_outputs` made."""
    return value.args[0] if value.target is torch.ops.aten.clone.default else value  # type: ignore[return-value]


def _identifier(port: Port) -> str:
    if port.role is Role.TANGENT:
        return f"tangent_{port.index}"
    return port.name.replace(".", "_").replace(":", "_")
