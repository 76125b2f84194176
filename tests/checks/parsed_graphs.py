"""Printed graphs, read back: the captured program, and the lowered graph with its layouts.

    %w = parameter            f32[16, 8]         a placeholder: its role, `parameter`, `buffer`, `constant`, `input` or
    %x = input                f32[4, 8]          `tangent`, stands where a call would
    %p = permute(%w, [1, 0])  f32[8, 16]         torch's operator of this name whose result has this type
    # backward                                   what follows belongs to backward
    return [%y, gradient of w: %g, new b: %c]    outputs; the gradient of a parameter; the new value of a buffer

Every value is computed anew as a fake tensor, and must have the type that is printed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_structure

from checks.parsed_layouts import NoStrategy, Operator, strategy_of
from checks.parsed_lines import Assigned, Call, Line, assigned
from shardc.errors import LayoutError
from shardc.ir.facts import Captured, Lowered, captured, describe, dtype_of, laid, lowered, origin
from shardc.ir.layout import SHORT_DTYPES, Layout, parse_typed
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role
from shardc.ir.versions import GraphVersion
from shardc.rules.factors.factoring import VIEWS
from shardc.runtime import wait
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import Collective

ROLES = (Role.PARAMETER, Role.BUFFER, Role.CONSTANT, Role.INPUT, Role.TANGENT)


class _Graph:
    """What both readers share: names, ports, the return line."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.nodes: dict[str, fx.Node] = {}
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.phase = "forward"

    def read(self, lines: Sequence[Line]) -> None:
        for line in lines:
            if line.text == "# backward":
                self.phase = "backward"
            elif line.text.startswith("return "):
                self._return(line)
            else:
                self._assigned(assigned(line))
        if not self.outputs:
            lines[-1].refuse("the graph ends without `return [...]`")

    def _assigned(self, given: Assigned) -> None:
        raise NotImplementedError

    def create(self, given: Assigned, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        op = "placeholder" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(op, target, args, kwargs, given.name)
        if node.name != given.name:
            given.line.refuse(f"%{given.name} is taken, by a value above or by Python; call it %{node.name}")
        self.nodes[given.name] = node
        return node

    def placeholder(self, given: Assigned) -> fx.Node | None:
        """The placeholder of a line, with its port; None if it is another line."""
        if given.call not in ROLES:
            return None
        role = Role(given.call)
        index = sum(port.role is role for port in self.inputs) if role in (Role.INPUT, Role.TANGENT) else 0
        name = {Role.INPUT: f"input:{index}", Role.TANGENT: ""}.get(role, given.name)
        self.inputs.append(Port(role, name, index))
        return self.create(given, given.name)

    def origin(self, given: Assigned) -> Any:
        """Where a line says that its value comes from: `module, file.py` or one of them."""
        words = [word.strip() for word in given.place.split(",") if word.strip() not in ("", "kept")]
        source = next((word for word in words if re.search(r"\.py(:\d+)?$", word)), "")
        return origin(next((word for word in words if word != source), ""), source, self.phase)

    def _return(self, line: Line) -> None:
        match = re.fullmatch(r"return \[(.*)\]", line.text)
        if match is None:
            line.refuse("write `return [%y, gradient of w: %g, new b: %c]`")
        results: list[fx.Node | None] = []
        for item in match[1].split(", "):
            told, _, name = item.rpartition(": ")
            role = Role.GRADIENT if told.startswith("gradient of ") else Role.MUTATION if told else Role.OUTPUT
            index = sum(port.role is Role.OUTPUT for port in self.outputs) if role is Role.OUTPUT else 0
            path = told.removeprefix("gradient of ").removeprefix("new ")
            self.outputs.append(Port(role, path, index))
            self._call_by_path(path)
            if name != "None" and name.removeprefix("%") not in self.nodes:
                line.refuse(f"{name} is not assigned above")
            results.append(self.nodes.get(name.removeprefix("%")))
        self.graph.output(tuple(results))

    def _call_by_path(self, path: str) -> None:
        """A placeholder `up_weight` is the parameter `up.weight`, where the return line says so."""
        for place, port in enumerate(self.inputs):
            if port.name and port.name == path.replace(".", "_"):
                self.inputs[place] = replace(port, name=path)

    def program(self, graph: fx.Graph) -> Program:
        leaves = [place for place, port in enumerate(self.outputs) if port.role is Role.OUTPUT]
        attached = frozenset(leaves if any(port.role is Role.GRADIENT for port in self.outputs) else ())
        version = GraphVersion.of(graph)
        return Program(version, self.inputs, self.outputs, tree_structure(leaves), [*leaves], attached=attached)


def typed(given: Assigned) -> tuple[torch.dtype, Layout]:
    """The dtype and the layout that a line prints."""
    try:
        return parse_typed(given.type)
    except LayoutError as error:
        given.line.refuse(str(error))


def brief(value: Any) -> str:
    """`f32[4, 8]` of a fake tensor."""
    return f"{SHORT_DTYPES[value.dtype]}{[int(n) for n in value.shape]}"


class _CapturedGraph(_Graph):
    def _assigned(self, given: Assigned) -> None:
        placed = self.placeholder(given)
        with self.mode:
            if placed is not None:
                dtype, layout = typed(given)
                describe(placed, Captured(torch.empty(layout.shape, dtype=dtype)))
                return
            item = re.fullmatch(r"%(\w+)\[(\d+)\]", given.call)
            if item is not None:
                source, index = self.nodes[item[1]], int(item[2])
                node = self.create(given, operator.getitem, (source, index))
                describe(node, Captured(captured(source).value[index], self.origin(given)))
                return
            self._call(given, Call(given, self.nodes))

    def _call(self, given: Assigned, call: Call) -> None:
        def wanted(value: Any) -> str:
            if not isinstance(value, Tensor):
                return ""
            dtype, layout = typed(given)
            right = (value.dtype, tuple(value.shape)) == (dtype, layout.shape)
            return "" if right else f"makes {brief(value)}"

        made = call.resolve(lambda node: captured(node).value, wanted)
        if made is not None:
            node, value = self.create(given, made.target, call.args, made.kwargs), made.value
        else:  # a function of the runtime, which normalize wrote
            function = call.function()
            if function is None:
                call.line.refuse(f"neither torch nor the runtime has anything called {call.name}")
            dtype, layout = typed(given)
            node = self.create(given, function, call.args, call.kwargs)
            value = torch.empty(layout.shape, dtype=dtype)
        describe(node, Captured(value, self.origin(given)))


def captured_program(lines: Sequence[Line]) -> Program:
    """The program that is printed, as capture or normalize leaves it."""
    reader = _CapturedGraph()
    reader.read(lines)
    return reader.program(reader.graph)


class _LoweredGraph(_Graph):
    """`local`: whether sizes in calls are those of one rank."""

    def __init__(self, mesh: Mesh, local: bool) -> None:
        super().__init__()
        self.mesh, self.local = mesh, local
        self.operators: list[tuple[Assigned, fx.Node]] = []
        self.padded: set[fx.Node] = set()  # helpers of the runtime may make other shapes than their layouts tell

    def read(self, lines: Sequence[Line]) -> None:
        super().read(lines)
        for given, node in self.operators:
            self._choose(given, node)

    def _assigned(self, given: Assigned) -> None:
        placed = self.placeholder(given)
        item = re.fullmatch(r"%(\w+)\[(\d+)\]", given.call)
        if placed is not None:
            self._describe(given, placed, (placed, 0))
        elif item is not None:
            source, index = self.nodes[item[1]], int(item[2])
            made: Any = source.target
            base = lowered(source.args[0][index]).base if isinstance(made, Bucket) else (source, index)  # type: ignore
            self._describe(given, self.create(given, operator.getitem, (source, index)), base)
        else:
            with self.mode:
                self._call(given, Call(given, self.nodes))

    def _describe(self, given: Assigned, node: fx.Node, base: Any, members: tuple[Any, ...] = ()) -> None:
        dtype, layout = typed(given) if given.type else (None, None)
        kept = "kept" in [word.strip() for word in given.place.split(",")]
        describe(node, Lowered(self.origin(given), dtype, layout, base, kept=kept, members=members))

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return laid(node).local_shape(self.mesh) if self.local else laid(node).shape

    def _fake(self, node: fx.Node) -> Tensor:
        return torch.empty(self._shape(node), dtype=dtype_of(node))

    def _call(self, given: Assigned, call: Call) -> None:
        function = call.function()
        # there is a collective called permute, as there is a view
        if (isinstance(function, Collective) and "axis" in call.kwargs) or function is wait:
            self._conversion(given, call, function)
            return

        def wanted(value: Any) -> str:
            if not isinstance(value, Tensor) or self._on_padded(call):
                return ""
            dtype, layout = typed(given)
            right = dtype, layout.local_shape(self.mesh) if self.local else layout.shape
            return "" if (value.dtype, tuple(value.shape)) == right else f"makes {brief(value)}"

        made = call.resolve(self._fake, wanted)
        target, kwargs = (made.target, made.kwargs) if made is not None else (function, call.kwargs)
        if target is None:
            call.line.refuse(f"neither torch nor the runtime has anything called {call.name}")
        node = self.create(given, target, call.args, kwargs)
        helper = made is None and call.name in HELPERS
        if made is None or self._on_padded(call):
            self.padded.add(node)
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        views = made is not None and target in VIEWS
        self._describe(given, node, lowered(first).base if first is not None and (helper or views) else (node, 0))
        if not helper:
            self.operators.append((given, node))

    def _on_padded(self, call: Call) -> bool:
        return any(isinstance(argument, fx.Node) and argument in self.padded for argument in call.args)

    def _conversion(self, given: Assigned, call: Call, function: Any) -> None:
        node = self.create(given, function, call.args, call.kwargs)
        sources: Any = call.args[0]
        if isinstance(function, Bucket):
            bases = tuple([lowered(one).base for one in sources])
            self._describe(given, node, bases[0], tuple([base for base in bases if base is not None]))
            return
        self._describe(given, node, lowered(sources).base)
        if isinstance(function, Collective):
            before, after = (laid(one).local_shape(self.mesh) for one in (sources, node))
            ways = self.mesh.sizes[str(call.kwargs["axis"])]
            made = tuple(function.shape(before, ways, call.kwargs))
            if made != after:
                call.line.refuse(
                    f"{function.name} makes {list(made)} a rank of {list(before)}, printed is {list(after)}"
                )

    def _choose(self, given: Assigned, node: fx.Node) -> None:
        users = [user for user in node.users if user.target is operator.getitem]
        results = {int(user.args[1]): user for user in users} if not given.type else {0: node}  # type: ignore[arg-type]
        layouts = {index: (dtype_of(one), laid(one)) for index, one in results.items()}
        with self.mode:
            try:
                told = next(iter(given.more), "")
                chosen = strategy_of(Operator(node, layouts, self.local), self.mesh, told)
            except NoStrategy as error:
                given.line.refuse(str(error))
        if chosen is not None:
            describe(node, replace(lowered(node), operator=chosen, base=None if not given.type else (node, 0)))


HELPERS = {"rebase", "pad_dummy", "drop_dummy", "fill"}
"""What `localize` puts before and after operators."""


def lowered_graph(lines: Sequence[Line], mesh: Mesh, local: bool) -> tuple[GraphVersion, Program]:
    """The graph that is printed, with what is known of every node, and the ports of its program."""
    reader = _LoweredGraph(mesh, local)
    reader.read(lines)
    ports = fx.Graph()
    for node in reader.graph.nodes:
        if node.op == "placeholder":
            with reader.mode:
                value = torch.empty(laid(node).shape, dtype=dtype_of(node))
            describe(ports.placeholder(node.name), Captured(value))
    ports.output(())
    return GraphVersion.of(reader.graph), reader.program(ports)


def by_name(version: GraphVersion) -> Mapping[str, fx.Node]:
    return {line.node.name: line.node for line in version.lines()}
