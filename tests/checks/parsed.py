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
                               `shared %w as f32[8, 4]` (as it was made, without), `output 0 as f32[4@dp, 8]` (whole),
                               under a memory bound `kept %x as f32[4@tp, 8]` or `again %x as ...`: what backward finds
    localize                   the lowered graph, with global sizes
    schedule ... codegen       the same with local sizes; after it, for bucket, `buckets of at most 4096 B`, and for
                               overlap `order` with the nodes in their order, `wait %r` where %r is awaited
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

import shardc
from checks.parsed_graphs import by_name, captured_program, lowered_graph, typed
from checks.parsed_layouts import NoStrategy, made_splits, printed_splits, printed_strategy
from checks.parsed_lines import Assigned, Line, assigned
from checks.shown import graph_of, shown
from shardc.analysis.memory import Memory
from shardc.cost.buckets import Buckets
from shardc.cost.hardware import Hardware, hardware
from shardc.cost.memory import bytes_of
from shardc.errors import LayoutError
from shardc.ir.layout import parse_typed
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.program import Program, Role, value_of
from shardc.ir.splits import Splits
from shardc.ir.versions import GraphVersion
from shardc.options import Options
from shardc.passes.factor import factor
from shardc.passes.pipeline import NAMES, PIPELINE
from shardc.passes.propagate import propagate
from shardc.planning.compilation import Compilation, Schedule
from shardc.planning.constraints import parameter_demands
from shardc.planning.cost_network import Assignment, CostNetwork, LayoutDemands
from shardc.planning.run_order import RunOrder
from shardc.rules.factors.factored import Key, Op

_LINK, _DEVICE = ("latency", "bandwidth", "overlap", "stall"), ("launch", "memory_bandwidth", "start", "memory")
_CHOSEN = re.compile(r"(shared|kept|again|regathered|output) (?:(\d+)|%(\w+)(?:\[(\d+)\])?) as (.+)")


_BEFORE = {"microbatch": (factor,), "retile": (factor,), "propagate": (factor,), "assign": (factor, propagate)}
"""The passes whose work is not in the text that a pass is given."""


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
        if self.name == "capture":
            graph = "\n".join(line.text for line in self.before)
        else:
            graph = shown(c, graph_of(self.name))
        extra = [line.text for line in _divided(self)[1]] if self.name in ("bucket", "overlap") else []
        before = "\n".join([graph.rstrip(), *([""] if extra else []), *extra])
        after = shown(PIPELINE[NAMES.index(self.name)].run(c), self.name)
        return f"{self.head.rstrip()}\n\nbefore\n{before}\n\nafter\n{after.rstrip()}\n"


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
    for one in _BEFORE.get(case.name, ()):
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
    """mesh dp=2,tp=4 · hardware h100, latency 0, bandwidth 1e9 (cpu without) · memory 1MB (unbounded without) ·
    mode propagate · outputs sharded · optimizer adamw · microbatches 4 · constraint w=tp,-"""
    mesh, device, constraints = None, hardware("cpu"), dict[str, str]()
    told: dict[str, Any] = {"memory": "unbounded"}
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
            case "microbatches":
                told[name] = int(value)
            case _:
                line.refuse("known are mesh, hardware, constraint, memory, mode, outputs, optimizer, microbatches")
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


def _assigned(c: Compilation, graph: Sequence[Line], rest: Sequence[Line]) -> Compilation:
    """The compilation with the choice that the graph and the lines after it tell."""
    network = CostNetwork(c.factored, c.mesh, c.options.device, LayoutDemands(whole_bytes=c.options.whole_bytes))
    network.build()
    assignment = network.assignment([0] * len(network.variables))  # whose every choice is replaced
    cells = {one.name: one for one in map(assigned, (line for line in graph if line.text.startswith("%")))}
    made = dict[Key, Splits]()
    for op in c.factored.ops:
        given = cells[op.node.name]
        lines = {0: given} if given.type and not given.type.startswith("{") else _taken_out(op, cells)
        told = next((cell for cell in (given.type, *given.more) if cell.startswith("{")), "")
        try:
            chosen = printed_strategy(network, op, {index: typed(one)[1] for index, one in lines.items()}, told)
        except NoStrategy as error:
            given.line.refuse(str(error))
        assignment.strategies[op.node] = chosen
        made |= made_splits(network, op, chosen)
    assignment.shares |= {key: made[key] for key in assignment.shares}
    for index in assignment.outputs:
        key = _output_key(c, index)
        assignment.outputs[index] = Splits(((),) * len(c.factored.sizes(key)))
    for line in rest:
        _told(c, network, assignment, line)
    return replace(c, network=network, assignment=assignment)


def _taken_out(op: Op, cells: Mapping[str, Assigned]) -> dict[int, Assigned]:
    """The lines that take out the results of an operator that has several."""
    users = [user for user in op.node.users if user.target is operator.getitem]
    return {int(cast(int, user.args[1])): cells[user.name] for user in users}


def _output_key(c: Compilation, index: int) -> Key:
    node = c.program.results[index]
    assert node is not None
    return c.factored.values[node].key


def _told(c: Compilation, network: CostNetwork, assignment: Assignment, line: Line) -> None:
    """One line after the graph: a share, an output, a value that backward finds kept or made again."""
    match = _CHOSEN.fullmatch(line.text)
    if match is None:
        line.refuse("write `shared %w as f32[8, 4]`, `output 0 as ...`, `kept %x as ...`, `again %x as ...`")
    word, output, name, index, layout = match.groups()
    if word not in ("output", "shared"):
        assignment.forward = frozenset(RunOrder(c.factored).forward)
    node = by_name(c.program.version).get(name)
    if node is None if output is None else int(output) not in assignment.outputs:
        line.refuse(f"there is no {f'%{name}' if output is None else f'output {output}'}")
    key = _output_key(c, int(output)) if output is not None else (cast(fx.Node, node), int(index or 0))
    try:
        splits = printed_splits(network, key, parse_typed(layout)[1])
    except (NoStrategy, LayoutError) as error:
        line.refuse(str(error))
    if output is not None:
        assignment.outputs[int(output)] = splits
    else:
        held = {"shared": assignment.shares, "regathered": assignment.regathered}
        held.get(word, assignment.kept)[key] = splits


def _lowered(
    case: Case, graph: Sequence[Line], rest: Sequence[Line], mesh: Mesh, options: Options
) -> Compilation:  # fmt: skip
    version, program = lowered_graph(graph, mesh, local=case.name != "localize")
    c = Compilation(ModelCall(nn.Module(), (), {}), mesh, options, program=program, lowered=version)
    if case.name not in ("bucket", "overlap"):
        return c
    buckets: Buckets | None = Buckets(mesh, options.device)
    apart, order = False, list[tuple[str, bool]]()
    nodes = by_name(version)
    below = ""  # the line below which the others stand
    for line in rest:
        size = re.fullmatch(r"buckets of (any size|at most (.+?))(, beside (.+) s of backward)?(, apart.*)?", line.text)
        if size is not None:
            most, beside = bytes_of(size[2]) if size[2] else math.inf, float(size[4] or 0.0)
            buckets, apart = Buckets(mesh, options.device, most, beside), size[5] is not None
        elif line.text == "no buckets":
            buckets = None
        elif line.text.startswith("  ") and below == "order":
            order += _order(line, nodes) if case.name == "overlap" else []  # it names buckets, which there are not yet
        elif not re.match(r"order$|  .* joins |memory |time ", line.text):
            line.refuse("write `buckets of at most 4096 B, beside 1 s of backward`, or `order`, `  %a, %b, wait %a`")
        below = below if line.text.startswith("  ") else line.text
    # what `bucket` and `overlap` do not read of a schedule is left out
    other = GraphVersion.of(version.read())
    schedule = Schedule(other, other, buckets, apart, order, cast(Memory, None), 0.0, 0.0)
    return replace(c, schedule=schedule)


def _order(line: Line, nodes: Any) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []
    for item in line.text.strip().strip(",").split(", "):
        name = item.removeprefix("wait ").removeprefix("%")
        if name not in nodes:
            line.refuse(f"{item}: the graph has no %{name}")
        found.append((name, item.startswith("wait ")))
    return found
