"""Measured timelines: what every statement of generated code took, and every collective, on each local rank.

    with measuring(executable, code) as measured:     the module's forward and backward tick after every statement
        step()
    measured.processes()                              one `Process` a rank, as `predicted` makes one

A statement's module is the one that the comment above it names. A collective is timed where the mesh starts it, so
those within bodies of operators count too. On CUDA, the rank waits for its device after every statement, so that
nothing of a collective is hidden.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from shardc.analysis.recorded_step import COMPUTE
from shardc.inspect.trace import Process, Slice
from shardc.ir.report import Columns, Section
from shardc.runtime import DistributedMesh, Executable
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.mesh.mesh import Context, RuntimeMesh, current

_TICK = "__tick__"
_SHOWN = 10


@dataclass(frozen=True)
class Statement:
    """A call in generated code: its function, the value that it makes, the operator, and the module and the line of the
    user's code, as the comment above it tells them."""

    phase: str
    value: str
    kind: str
    module: str
    place: str


class MeasuredSteps:
    """What was measured since the last `clear`, in seconds of this process's clock."""

    def __init__(self, mesh: RuntimeMesh, statements: Sequence[Statement]) -> None:
        self.mesh, self._statements = mesh, statements
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self._ticks: dict[int, list[tuple[int, float]]] = {rank: [] for rank in self.mesh.ranks}
        self._sent: dict[int, list[Slice]] = {rank: [] for rank in self.mesh.ranks}

    def tick(self, number: int) -> None:
        """A rank has run the statement of that number; -1 where a function begins."""
        context = current()
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        self._ticks[context.rank].append((number, perf_counter()))

    def sent(self, rank: int, one: Slice) -> None:
        """A rank has run a collective."""
        self._sent[rank].append(one)

    def processes(self) -> list[Process]:
        """The tracks of every local rank, from the moment at which the first rank began."""
        zero = min((ticks[0][1] for ticks in self._ticks.values() if ticks), default=0.0)
        return [Process(f"measured, rank {rank}", self._slices(rank, zero)) for rank in self.mesh.ranks]

    def _slices(self, rank: int, zero: float) -> tuple[Slice, ...]:
        found: list[Slice] = []
        before = zero
        for number, now in self._ticks[rank]:
            if number >= 0:
                one = self._statements[number]
                told = {"value": one.value, "place": one.place, "phase": one.phase}
                found.append(Slice(COMPUTE, one.module, one.kind, before - zero, now - zero, told))
            before = now
        for one in self._sent[rank]:
            inside = next((s for s in found if s.start <= one.start - zero <= s.end), None)
            module = inside.module if inside is not None else ""
            found.append(Slice(one.track, module, one.kind, one.start - zero, one.end - zero, one.told))
        return tuple(found)


@contextmanager
def measuring(executable: Executable, code: str) -> Generator[MeasuredSteps]:
    """In here, a module that was generated as `code` is measured as it runs."""
    tree, statements = _ticking(code)
    measured, module, mesh = MeasuredSteps(executable.mesh, statements), executable.module, executable.mesh
    names = {**vars(module), _TICK: measured.tick}
    exec(compile(tree, str(module.__file__), "exec"), names)
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


def _ticking(code: str) -> tuple[ast.Module, list[Statement]]:
    """Generated code in which every call is followed by a tick, and the statements that are numbered so."""
    tree, statements = ast.parse(code), list[Statement]()
    lines = code.splitlines()
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef) or function.name not in ("forward", "backward"):
            continue
        body: list[ast.stmt] = [_tick(-1, function.body[0])]
        first = function.lineno
        for statement in function.body:
            body.append(statement)
            if isinstance(statement, ast.Assign) and isinstance(statement.value, (ast.Call, ast.Subscript)):
                body.append(_tick(len(statements), statement))
                comments = lines[first : statement.lineno - 1]
                place = next((line.strip()[2:] for line in reversed(comments) if line.strip().startswith("# ")), "")
                value = ast.unparse(statement.targets[0])
                module, source = _divided(place)
                statements.append(Statement(function.name, value, _kind(statement.value), module, source))
        function.body = body
    return ast.fix_missing_locations(tree), statements


def _tick(number: int, at: ast.stmt) -> ast.stmt:
    call = ast.Call(ast.Name(_TICK, ast.Load()), [ast.Constant(number)], [])
    return ast.copy_location(ast.Expr(call), at)


def _divided(place: str) -> tuple[str, str]:
    """The module and the line of `layers.0.mlp, model.py:41`; either may be missing."""
    module, _, source = place.rpartition(", ")
    return (module, source) if re.search(r":\d+$", source) else (place, "")


def _kind(call: ast.expr) -> str:
    """The operator that a statement calls: `mm` of `aten.mm.default(...)`, `all_reduce` of `all_reduce.start(...)`."""
    if not isinstance(call, ast.Call):
        return "getitem"
    parts = ast.unparse(call.func).split(".")
    if parts[0] == "aten":
        return parts[1]
    return parts[-2] if len(parts) > 1 else parts[0]


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
