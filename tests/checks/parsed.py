"""Cases: text files that show one pass on a small program, and the compilation that such a text stands for.

    # localize: sizes in views become those of one rank     sentences that say what the case shows
    mesh dp=2                                               directives, one a line (see `_options`)

    before
    %x = input                  f32[32@dp, 512]             what the pass gets (see `parsed_graphs`)
    %v = view(%x, [32, 8, 64])  f32[32@dp, 8, 64]
    return [%v]

    after
    ...                                                     what it makes of that

The folder of a file names its pass. `before` is

    capture                    Python, which sets `model` and `inputs`
    normalize ... assign       the captured program
    reshard                    the captured program with the layouts and strategies that `assign` chose, and after it
                               `shared %w as f32[8, 4]`, `output 0 as f32[4@dp, 8]`, `kept %x as f32[4@tp, 8]`
    localize                   the lowered graph, with global sizes
    schedule ... codegen       the same with local sizes; after it, for bucket, `buckets of at most 4096 B`, for overlap,
                               `order` and the nodes in their order, `wait %r` where %r is awaited
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import shardc
from checks.parsed_graphs import by_name, captured_program, lowered_graph, typed
from checks.parsed_layouts import NoStrategy, made_splits, printed_splits, printed_strategy
from checks.parsed_lines import Assigned, Line, assigned
from checks.shown import shown
from shardc.analysis.memory import Memory
from shardc.analysis.timeline import Order
from shardc.cost.hardware import Hardware, hardware
from shardc.cost.memory import bytes_of
from shardc.errors import LayoutError
from shardc.ir.layout import Layout, parse_typed
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.program import Program, Role, value_of
from shardc.ir.versions import GraphVersion
from shardc.options import Options
from shardc.passes.factor import factor
from shardc.passes.pipeline import NAMES, PIPELINE
from shardc.passes.propagate import propagate
from shardc.planning.compilation import Compilation, Schedule
from shardc.planning.constraints import parameter_demands
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.planning.run_order import RunOrder
from shardc.rules.factors.factored import Key

_LINK, _DEVICE = ("latency", "bandwidth", "overlap", "stall"), ("launch", "memory_bandwidth", "start", "memory")
_CHOSEN = re.compile(r"(shared|kept|regathered) %(\w+)(?:\[(\d+)\])? as (.+)|output (\d+) as (.+)|kept nothing")


@dataclass(frozen=True)
class Case:
    """A file: what stands above `before`, and the lines of its parts."""

    path: Path
    head: str
    directives: tuple[Line, ...]
    before: tuple[Line, ...]
    after: str

    @property
    def name(self) -> str:
        """The pass that runs."""
        return self.path.parent.name

    def run(self) -> str:
        """The text of the file as it is to be: `before` in straight columns, `after` what the pass makes of it."""
        c = compilation(self)
        previous = NAMES[NAMES.index(self.name) - 1] if self.name != "capture" else ""
        graph = "\n".join(line.text for line in self.before) if self.name == "capture" else shown(c, _like(previous))
        extra = [line.text for line in _divided(self)[1]] if self.name in ("bucket", "overlap") else []
        before = "\n".join([graph.rstrip(), *([""] if extra else []), *extra])
        after = shown(PIPELINE[NAMES.index(self.name)].run(c), self.name)
        return f"{self.head.rstrip()}\n\nbefore\n{before}\n\nafter\n{after.rstrip()}\n"


def _like(previous: str) -> str:
    """What a graph is shown as before a pass: the decision of `schedule` stands after it, as it was written."""
    return {"schedule": "localize", "propagate": "propagate"}.get(previous, previous)


def read(path: Path) -> Case:
    """The case of a file."""
    lines = [Line(path, number, text.rstrip()) for number, text in enumerate(path.read_text().splitlines(), 1)]
    texts = [line.text for line in lines]
    if "before" not in texts:
        lines[0].refuse("a case has a line `before`, then what the pass gets")
    start = texts.index("before")
    end = texts.index("after", start) if "after" in texts[start:] else len(lines)
    head = lines[:start]
    before = [*lines[start + 1 : end]]
    while before and not before[-1].text:
        before.pop()
    if not lines[0].text.startswith("# ") or path.parent.name not in NAMES:
        lines[0].refuse("a case begins with `# what it shows`, and lies in the folder of its pass")
    directives = tuple(line for line in head if line.text and not line.text.startswith("#"))
    return Case(path, "\n".join(line.text for line in head), directives, tuple(before), "\n".join(texts[end + 1 :]))


def compilation(case: Case) -> Compilation:
    """The compilation that the pass of the case is given."""
    mesh, options = _options(case)
    if case.name == "capture":
        return Compilation(_model_call(case), mesh, options)
    graph, rest = _divided(case)
    if NAMES.index(case.name) > NAMES.index("reshard"):
        return _lowered(case, graph, rest, mesh, options)
    program = captured_program(graph)
    model = _model_of(program)
    demands = parameter_demands(program, model, options.constraints, mesh)
    c = Compilation(ModelCall(model, (), {}), mesh, options, program=program, demands=demands)
    for one in {"retile": (factor,), "propagate": (factor,), "assign": (factor, propagate)}.get(case.name, ()):
        c = one.run(c)  # what they add is told by the graph and the directives
    return _assigned(factor.run(c), graph, rest) if case.name == "reshard" else c


def _divided(case: Case) -> tuple[list[Line], list[Line]]:
    """The lines of the graph, and those after it."""
    lines = [line for line in case.before if line.text]
    ends = [i for i, line in enumerate(lines) if line.text.startswith("return ")]
    if not ends:
        lines[-1].refuse("the graph ends without `return [...]`")
    return lines[: ends[0] + 1], lines[ends[0] + 1 :]


def _options(case: Case) -> tuple[Mesh, Options]:
    """mesh dp=2,tp=4 · hardware h100, latency 0, bandwidth 1e9 (cpu without) · memory 1MB · mode propagate ·
    outputs sharded · optimizer adamw · constraint w=tp,-"""
    mesh, device, constraints, told = None, hardware("cpu"), dict[str, str](), dict[str, Any]()
    for line in case.directives:
        name, _, value = line.text.partition(" ")
        match name:
            case "mesh":
                mesh = Mesh.parse(value)
            case "hardware":
                device = _hardware(line, value)
            case "constraint":
                path, _, spec = value.partition("=")
                constraints[path] = spec
            case "memory" | "mode" | "outputs" | "optimizer":
                told[name] = value
            case _:
                line.refuse("known are mesh, hardware, constraint, memory, mode, outputs, optimizer")
    if mesh is None:
        case.before[0].refuse("name the mesh above: `mesh dp=2,tp=4`")
    return mesh, Options(hardware=device, constraints=constraints, **told)


def _hardware(line: Line, text: str) -> Hardware:
    """`cpu, latency 0, bandwidth 1e9`: a device of ours, with other numbers; those of links count for all of them."""
    first, *changes = [piece.strip() for piece in text.split(",")]
    device = hardware(first)
    for change in changes:
        name, _, value = change.partition(" ")
        if name in _LINK:
            links = {link: replace(getattr(device, link), **{name: float(value)}) for link in ("inside", "between")}
            device = replace(device, **links)
        elif name in _DEVICE:
            device = replace(device, **{name: float(value)})
        elif name == "flops":
            device = replace(device, flops=dict.fromkeys(device.flops, float(value)))
        else:
            line.refuse(f"a device has no {name}; known are flops, {', '.join((*_LINK, *_DEVICE))}")
    return device


def _model_call(case: Case) -> ModelCall:
    source = "\n".join(line.text for line in case.before)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "Tensor": Tensor, "shardc": shardc, "__name__": "model"}
    exec(compile(source, "model.py", "exec"), names)
    return ModelCall.of(names["model"], names["inputs"])


def _model_of(program: Program) -> nn.Module:
    """A module with the parameters of a program: constraints name them."""
    model = nn.Module()
    for port, node in zip(program.inputs, program.placeholders, strict=True):
        if port.role is Role.PARAMETER:
            *path, name = port.name.split(".")
            home = model
            for part in path:
                if not hasattr(home, part):
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            home.register_parameter(name, nn.Parameter(torch.empty(value_of(node).shape, device="meta")))
    return model


# ------------------------------------------------------------------------------------------------------------ reshard


def _assigned(c: Compilation, graph: Sequence[Line], rest: Sequence[Line]) -> Compilation:
    """The compilation with the choice that the graph and the lines after it tell."""
    network = CostNetwork(c.factored, c.mesh, c.options.device, {}, c.options.outputs == "full")
    cells = {one.name: one for line in graph if line.text.startswith("%") for one in (assigned(line),)}
    strategies, made = dict[Any, Any](), dict[Key, Any]()
    for op in c.factored.ops:
        given = cells[op.node.name]
        layout = typed(given)[1] if given.type.partition("[")[0].isalnum() and "[" in given.type else None
        told = next((cell for cell in (given.type, *given.more) if cell.startswith("{")), "")
        try:
            strategies[op.node] = printed_strategy(network, op, layout, told)
        except NoStrategy as error:
            given.line.refuse(str(error))
        made |= made_splits(network, op, strategies[op.node])
    users = network._users()
    shares = {key: splits for key, splits in made.items() if users[key] > 1 and _is_shared(c.program, key)}
    outputs = {
        index: printed_splits(network, c.factored.values[node].key, Layout.whole(_shape_of(c, node)))
        for index, (port, node) in enumerate(zip(c.program.outputs, c.program.results, strict=True))
        if node is not None and port.role is not Role.GRADIENT
    }
    shapes = {op.node: network.options_of(op).shape for op in c.factored.ops}
    assignment = Assignment(strategies, shapes, shares, outputs)
    for line in rest:
        _told(c, network, assignment, line)
    return replace(c, network=network, assignment=assignment)


def _is_shared(program: Program, key: Key) -> bool:
    """Inputs and buffers are converted for each reader."""
    ports = dict(zip(program.placeholders, program.inputs, strict=True))
    return key[0] not in ports or ports[key[0]].role is Role.PARAMETER


def _shape_of(c: Compilation, node: Any) -> tuple[int, ...]:
    """The shape of the base value of an output."""
    producer, index = c.factored.values[node].key
    value = value_of(producer)
    return tuple((value[index] if isinstance(value, (tuple, list)) else value).shape)


def _told(c: Compilation, network: CostNetwork, assignment: Assignment, line: Line) -> None:
    """One line after the graph: a share, an output, a value that is kept for backward."""
    match = _CHOSEN.fullmatch(line.text)
    if match is None:
        line.refuse("write `shared %w as f32[8, 4]`, `output 0 as ...`, `kept %x as ...`, `regathered %x as ...`")
    word, name, index, layout, output, of_output = match.groups()
    if "kept" in line.text:
        assignment.forward = frozenset(RunOrder(c.factored).forward)
    nodes = by_name(c.program.version)
    if output is None and word is None:
        return
    node = c.program.results[int(output)] if output is not None else nodes.get(name)
    if node is None:
        line.refuse(f"there is no {f'output {output}' if output is not None else f'%{name}'}")
    key = (node, int(index or 0)) if output is None else c.factored.values[node].key
    try:
        splits = printed_splits(network, key, parse_typed(layout or of_output)[1])
    except (NoStrategy, LayoutError) as error:
        line.refuse(str(error))
    if output is not None:
        assignment.outputs[int(output)] = splits
    else:
        {"shared": assignment.shares, "kept": assignment.kept, "regathered": assignment.regathered}[word][key] = splits


# ------------------------------------------------------------------------------------------------------------ lowered


def _lowered(
    case: Case, graph: Sequence[Line], rest: Sequence[Line], mesh: Mesh, options: Options
) -> Compilation:  # fmt: skip
    version, program = lowered_graph(graph, mesh, local=case.name != "localize")
    c = Compilation(ModelCall(nn.Module(), (), {}), mesh, options, program=program, lowered=version)
    if case.name not in ("bucket", "overlap"):
        return c
    most, apart, order = math.inf, False, list[tuple[Any, bool]]()
    nodes = by_name(version)
    for line in rest:
        size = re.fullmatch(r"buckets of (any size|at most (.+?))(, apart.*)?", line.text)
        if size is not None:
            most, apart = bytes_of(size[2]) if size[2] else math.inf, size[3] is not None
        elif line.text == "no buckets":
            most = 0.0
        elif line.text.startswith("  "):
            order += _order(line, nodes)
        elif line.text != "order":
            line.refuse("write `buckets of at most 4096 B`, or `order` and below it `%a, %b, wait %a`")
    # what `bucket` and `overlap` do not read of a schedule is left out
    other = GraphVersion.of(version.read())
    schedule = Schedule(other, other, most, apart, cast(Order, order), cast(Memory, None), 0.0, 0.0)
    return replace(c, schedule=schedule)


def _order(line: Line, nodes: Any) -> Order:
    found: Order = []
    for item in line.text.strip().strip(",").split(", "):
        name = item.removeprefix("wait ").removeprefix("%")
        if name not in nodes:
            line.refuse(f"{item}: the graph has no %{name}")
        found.append((nodes[name], item.startswith("wait ")))
    return found


__all__ = ["Assigned", "Case", "compilation", "read"]
