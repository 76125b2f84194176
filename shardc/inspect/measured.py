"""Measured timelines: what every call of generated code took, and every collective, on each local rank.

    with measuring(executable, code) as measured:     the module's functions tick after every call
        step()
    processes(measured.ranks(), statements(c))        one `Process` a rank, as `predicted` makes one

Forward and backward run the calls of their graphs in order, whatever functions and loops they stand in: tick number 40
of forward is call number 40 of its graph, which knows the layer. A collective is timed where the mesh starts it, so
those within bodies of operators count too. On CUDA, the rank waits for its device after every call, so that nothing of
a collective is hidden.
"""

from __future__ import annotations

import ast
import operator
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from shardc.analysis.operands import collective_of
from shardc.analysis.recorded_step import COMPUTE
from shardc.analysis.timeline import is_started
from shardc.inspect.trace import Process, Slice, told_of
from shardc.ir.facts import origin_of
from shardc.ir.partition import partition
from shardc.ir.program import name_of
from shardc.ir.report import Columns, Section
from shardc.planning.compilation import Compilation
from shardc.runtime import DistributedMesh, Executable
from shardc.runtime.collectives.collective import AnyCollective, wait
from shardc.runtime.mesh.mesh import Context, RuntimeMesh, current
from shardc.source.calls import is_view
from shardc.source.grammar import LineKind, read

_BEGIN, _TICK = "__begin__", "__tick__"
_TICKED = {LineKind.OPERATOR, LineKind.BODY, LineKind.COLLECTIVE, LineKind.START, LineKind.WAIT, LineKind.WAITS}
_SHOWN = 10


@dataclass(frozen=True)
class Statement:
    """A call of forward or backward: the path of the user's module, the operator or collective, and what else a trace
    tells of it."""

    module: str
    kind: str
    told: Mapping[str, Any]


Statements = Mapping[str, Sequence[Statement]]
"""The calls of forward and of backward, as they run."""


def statements(c: Compilation) -> Statements:
    """The calls of the code of a compilation that `overlap` has left."""
    run = partition(c.lowered.read(), c.program)

    def of(phase: str, nodes: Sequence[fx.Node]) -> list[Statement]:
        calls = [node for node in nodes if node.target is not operator.getitem and not is_view(node)]
        return [Statement(origin_of(n).module, _kind(n), {**told_of(n, c.mesh), "phase": phase}) for n in calls]

    return {"forward": of("forward", run.forward), "backward": of("backward", run.backward)}


def _kind(node: fx.Node) -> str:
    """`mm`, `all_reduce`, or, where it is started ahead, `start all_reduce` and `wait for all_reduce`."""
    source = node.args[0] if node.target is wait else node
    assert isinstance(source, fx.Node)
    collective = collective_of(source)
    if collective is None:
        return name_of(node.target)
    does = "wait for " if source is not node else "start " if is_started(node) else ""
    return f"{does}{collective.name}"


@dataclass
class _MeasuredHalf:
    """One run of forward or backward: when it began, and when each of its calls had run."""

    phase: str
    begin: float
    ends: list[float] = field(default_factory=list[float])


@dataclass(frozen=True)
class MeasuredRank:
    """What one rank ran, by the clock of its process, and when the first rank there began. It can be sent to another
    process."""

    rank: int
    zero: float
    halves: tuple[_MeasuredHalf, ...]
    sent: tuple[Slice, ...]


class MeasuredSteps:
    """What was measured since the last `clear`."""

    def __init__(self, mesh: RuntimeMesh) -> None:
        self.mesh = mesh
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self._halves: dict[int, list[_MeasuredHalf]] = {rank: [] for rank in self.mesh.ranks}
        self._sent: dict[int, list[Slice]] = {rank: [] for rank in self.mesh.ranks}

    def begin(self, phase: str) -> None:
        """A rank begins with forward or backward."""
        self._halves[current().rank].append(_MeasuredHalf(phase, _now()))

    def tick(self, made: Tensor | None = None) -> Tensor | None:
        """A rank has run the next call, which has `made` something."""
        self._halves[current().rank][-1].ends.append(_now())
        return made

    def sent(self, rank: int, one: Slice) -> None:
        """A rank has run a collective."""
        self._sent[rank].append(one)

    def ranks(self) -> list[MeasuredRank]:
        """What every local rank ran."""
        zero = min((half.begin for halves in self._halves.values() for half in halves), default=0.0)
        return [
            MeasuredRank(rank, zero, tuple(self._halves[rank]), tuple(self._sent[rank])) for rank in self.mesh.ranks
        ]


def _now() -> float:
    device = current().device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def processes(ranks: Sequence[MeasuredRank], calls: Statements) -> list[Process]:
    """The tracks of every rank. `calls` are those of the code that ran; under torchrun all ranks run that of rank 0."""
    return [Process(f"measured, rank {one.rank}", _slices(one, calls)) for one in ranks]


def _slices(rank: MeasuredRank, calls: Statements) -> tuple[Slice, ...]:
    found: list[Slice] = []
    for half in rank.halves:
        before = half.begin - rank.zero
        for call, end in zip(calls[half.phase], half.ends, strict=True):
            found.append(Slice(COMPUTE, call.module, call.kind, before, end - rank.zero, dict(call.told)))
            before = end - rank.zero
    starts = [one.start for one in found]
    sent: list[Slice] = []
    for one in rank.sent:
        start = one.start - rank.zero
        inside = found[bisect_right(starts, start) - 1]  # a call is running whenever a collective starts
        told = {**one.told, "phase": inside.told["phase"]}
        sent.append(replace(one, module=inside.module, start=start, end=one.end - rank.zero, told=told))
    return (*found, *sent)


@contextmanager
def measuring(executable: Executable, code: str) -> Generator[MeasuredSteps]:
    """In here, a module that was generated as `code` is measured as it runs."""
    measured, module, mesh = MeasuredSteps(executable.mesh), executable.module, executable.mesh
    names = {**vars(module), _BEGIN: measured.begin, _TICK: measured.tick}
    exec(compile(_ticking(code), str(module.__file__), "exec"), names)
    plain = {name: getattr(module, name) for name in ("forward", "backward") if hasattr(module, name)}
    for name in plain:
        setattr(module, name, names[name])
    setattr(mesh, "begin", _timed(mesh, measured))  # noqa: B010 - an attribute of the object hides the method
    try:
        yield measured
    finally:
        delattr(mesh, "begin")
        for name, function in plain.items():
            setattr(module, name, function)


def _timed(mesh: RuntimeMesh, measured: MeasuredSteps) -> Callable[..., Callable[[], Tensor]]:
    """`mesh.begin`, and when each collective began and ended. On a virtual mesh it has ended when it was started."""
    begin, later = mesh.begin, isinstance(mesh, DistributedMesh)

    def timed(context: Context, collective: AnyCollective, axis: str, operand: Tensor, op: str) -> Callable[[], Tensor]:
        start, told = perf_counter(), {"bytes": operand.numel() * operand.element_size(), "op": op}

        def ended() -> None:
            one = Slice(axis, "", collective.single.name, start, perf_counter(), told)
            measured.sent(context.rank, one)

        arrive = begin(context, collective, axis, operand, op)
        if not later:
            ended()
            return arrive

        def arrived() -> Tensor:
            result = arrive()
            ended()
            return result

        return arrived

    return timed


def _ticking(code: str) -> ast.Module:
    """Generated code whose functions tick after every call, and in which forward and backward say that they begin."""
    ticked = {line.number for lines in read(code).values() for line in lines if line.kind in _TICKED}
    return ast.fix_missing_locations(_Ticking(ticked).visit(ast.parse(code)))


class _Ticking(ast.NodeTransformer):
    def __init__(self, ticked: set[int]) -> None:
        self.ticked = ticked

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if node.name in ("forward", "backward"):
            node.body.insert(0, _call(node.body[0], _BEGIN, ast.Constant(node.name)))
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list[ast.AST]:
        if node.lineno not in self.ticked:
            return node
        if isinstance(node.value, ast.ListComp):  # each of several calls
            node.value.elt = ast.Call(ast.Name(_TICK, ast.Load()), [node.value.elt], [])
            return node
        return [node, _call(node, _TICK)]


def _call(at: ast.stmt, name: str, *arguments: ast.expr) -> ast.stmt:
    return ast.copy_location(ast.Expr(ast.Call(ast.Name(name, ast.Load()), [*arguments], [])), at)


def differences(expected: Process, found: Process) -> Section:
    """Where the two part: the modules whose seconds differ most, those of collectives that they wait for included."""
    before, after = _by_module(expected), _by_module(found)
    names = sorted(before.keys() | after.keys())
    told = [(name, before.get(name, 0.0), after.get(name, 0.0)) for name in names]
    told.sort(key=lambda row: -abs(row[1] - row[2]))
    rows = [
        ("module", "predicted", "measured", "difference"),
        *((name or "(root)", _shown(a), _shown(b), f"{'-' if b < a else '+'}{_shown(abs(b - a))}")
          for name, a, b in told[:_SHOWN]),
    ]  # fmt: skip
    return Section("where they part most", Columns(rows, "<>>>"))


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _by_module(process: Process) -> dict[str, float]:
    sums: dict[str, float] = {}
    for one in process.slices:
        if one.track == COMPUTE:
            sums[one.module] = sums.get(one.module, 0.0) + one.end - one.start
    return sums
