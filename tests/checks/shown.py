"""A compilation as a case shows it: the graph as it is printed, and what else the last pass decided.

Columns are as narrow as the graph allows. Placeholders show their role, the return line what the outputs are, and
`# backward` where backward begins. Beside its value, each operator shows its atoms and factors after `factor`, its
strategy after `assign`.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx

from checks.parsed_layouts import strategy_text
from shardc.explain.graphs import graph_after
from shardc.ir.facts import Lowered, captured
from shardc.ir.layout import Layout, describe
from shardc.ir.printing import columns, in_bytes, in_seconds
from shardc.ir.program import Port, Role
from shardc.ir.splits import Splits
from shardc.ir.versions import GraphLine
from shardc.passes.pipeline import NAMES
from shardc.planning.compilation import Compilation
from shardc.planning.cost_network import Assignment
from shardc.rules.factors.atoms import Ref
from shardc.rules.factors.chosen import chosen_of
from shardc.rules.factors.factored import Factored, Key, Op, Value
from shardc.rules.factors.strategy import make
from shardc.runtime.collectives.bucket import Bucket

Cells = tuple[str, ...]
WAIT = "wait\u00a0"
"""Between `wait` and its value no line ends: `textwrap` breaks at plain blanks only."""


def shown(c: Compilation, after: str) -> str:
    """What a case shows of a compilation once the pass `after` has run: its `after`, and the next pass's `before`."""
    if c.has("code"):
        return c.code()
    if after == "schedule":
        return decision(c)
    if after in ("factor", "microbatch", "retile"):
        return graph(c, _Atoms(c.factored).beside)
    if after == "assign":
        # without what constraints spread: views would show that, beside values that show what was chosen
        bare = replace(c, spread=Compilation.spread)
        return graph(bare, lambda node: (_strategy(c, node),)) + "".join(f"{line}\n" for line in _held(c))
    conflicts = c.spread.conflicts if after == "propagate" else []
    beside = (lambda node: (_variant(c, node),)) if c.has("lowered") else (lambda _: ())
    return graph(c, beside) + "".join(f"conflict: {text}\n" for text in conflicts)


def before(snapshots: Mapping[str, Compilation], name: str) -> str:
    """What a case shows before the pass `name` of a compilation whose passes left `snapshots`."""
    previous = NAMES[NAMES.index(name) - 1]
    text = shown(snapshots[previous], graph_of(name))
    if name in ("bucket", "overlap"):
        text += f"\n{decision(snapshots['schedule'])}"
    return text


def graph_of(name: str) -> str:
    """The pass as after which the graph is shown that the pass `name` is given: `schedule` changes none."""
    previous = NAMES[NAMES.index(name) - 1]
    return "simplify" if previous == "schedule" else previous


def graph(c: Compilation, beside: Callable[[fx.Node], Cells]) -> str:
    """The printed graph in narrow columns, with what is to be told `beside` each value."""
    lines = c.lowered.lines() if c.has("lowered") else c.program.version.lines()
    texts = graph_after(c).splitlines()
    rows: list[tuple[str, ...]] = []
    ports = iter(c.program.inputs)
    places: list[str] = []
    for line, text in zip(lines, texts, strict=True):
        if line.node.op == "output":
            continue
        text, _, place = text.partition("  # ")
        call, *types = re.split(r"\s{2,}", text.strip())
        if line.node.op == "placeholder":
            call = call.replace("= input", f"= {next(ports).role.value}")
        rows.append((call, types[0] if types and types[0] else "", *beside(line.node)))
        kept = isinstance(facts := line.meta["facts"], Lowered) and facts.kept
        places.append(", ".join([*([place.strip()] if place.strip() else []), *(["kept"] if kept else [])]))
    told = columns(rows, "<" * len(rows[0]))
    out = _with_places(told, places)
    first = next((i for i, line in enumerate(lines) if _backward(line)), None)
    if first is not None:
        out.insert(first, "# backward")
    return "".join(f"{line}\n" for line in [*out, _return(c, lines[-1])])


def _with_places(lines: list[str], places: list[str]) -> list[str]:
    width = max(map(len, lines))
    return [f"{line:<{width}}  # {place}" if place else line for line, place in zip(lines, places, strict=True)]


def _backward(line: GraphLine) -> bool:
    return line.node.op == "call_function" and line.meta["facts"].origin.phase == "backward"


def _return(c: Compilation, line: GraphLine) -> str:
    def one(port: Port, node: fx.Node | None) -> str:
        value = "None" if node is None else f"%{node.name}"
        told = {Role.GRADIENT: f"gradient of {port.name}: ", Role.MUTATION: f"new {port.name}: "}
        return told.get(port.role, "") + value

    return f"return [{', '.join(one(*pair) for pair in zip(c.program.outputs, line.args[0], strict=True))}]"


class _Atoms:
    """`[a32, (b4 c8)]  m=a n=(b c)`: a value's dims in atoms, each called by a letter, and an operator's factors."""

    def __init__(self, factored: Factored) -> None:
        self.factored = factored
        self.letters: dict[int, str] = {}
        self.ops = {op.node: op for op in factored.ops}

    def beside(self, node: fx.Node) -> Cells:
        op, value = self.ops.get(node), self.factored.values.get(node)
        dims = "" if value is None else f"[{', '.join(self._dim(value, dim) for dim in range(len(value.dims)))}]"
        return dims, self._factors(op) if op is not None and node.op != "placeholder" else ""

    def _atom(self, ref: Ref) -> str:
        return self.letters.setdefault(self.factored.atoms.piece(ref), _letter(len(self.letters)))

    def _dim(self, value: Value, dim: int) -> str:
        leaves = self.factored.atoms.leaves(value.dims[dim])
        texts = [f"{self._atom(ref)}{self.factored.atoms.size(ref)}" for ref in leaves]
        return "1" if not texts else texts[0] if len(texts) == 1 else f"({' '.join(texts)})"

    def _factors(self, op: Op) -> str:
        atoms: dict[int, str] = {}
        for item, carried in zip(op.items, op.kind.carried, strict=True):
            for ref, position in zip(self.factored.leaves(item.value), carried, strict=True):
                if position is not None:
                    atoms.setdefault(position, self._atom(ref))
        told: dict[str, list[str]] = {}
        for position, one in enumerate(op.factors):
            kind = " whole" if one.whole else " parted" if one.parting else ""
            told.setdefault(f"{one.name}{kind}", []).append(atoms[position])
        words = []
        for name, pieces in told.items():
            name, _, kind = name.partition(" ")
            joined = pieces[0] if len(pieces) == 1 else f"({' '.join(pieces)})"
            words.append(f"{name}={joined}{f' {kind}' if kind else ''}")
        return ", ".join(words)


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")


def _strategy(c: Compilation, node: fx.Node) -> str:
    op = next((op for op in c.factored.ops if op.node is node), None)
    if op is None or node.op == "placeholder":
        return ""
    return strategy_text(op, c.assignment.strategies[node], c.mesh)


def _variant(c: Compilation, node: fx.Node) -> str:
    """The strategy of a lowered operator, where its layouts do not tell: until its body is written, the variant."""
    chosen = chosen_of(node)
    if chosen is None or not chosen.strategy.variant or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return strategy_text(chosen.op, chosen.strategy._replace(again=False), c.mesh)


def _held(c: Compilation) -> Iterator[str]:
    """What else was chosen: values that are shared in another layout than they were made in, outputs that are not
    whole, and what backward finds of forward's values: kept, or made again."""
    chosen, made = c.assignment, _made(c, c.assignment)
    for key, splits in chosen.shares.items():
        if splits != made[key]:
            yield f"shared {_value(key)} as {_layout(c, key, splits)}"
    for key, splits in chosen.kept.items():
        yield f"{'again' if chosen.strategies[key[0]].again else 'kept'} {_value(key)} as {_layout(c, key, splits)}"
    for key, splits in chosen.regathered.items():
        yield f"regathered {_value(key)} as {_layout(c, key, splits)}"
    for index, splits in chosen.outputs.items():
        node = c.program.results[index]
        if any(splits.axes) and node is not None:
            yield f"output {index} as {_layout(c, c.factored.values[node].key, splits)}"


def _value(key: Key) -> str:
    return f"%{key[0].name}[{key[1]}]" if key[1] else f"%{key[0].name}"


def _made(c: Compilation, assignment: Assignment) -> dict[Key, Splits]:
    return {
        result.key: make(assignment.shapes[op.node], assignment.strategies[op.node], index, c.mesh)
        for op in c.factored.ops
        for index, result in enumerate(op.results)
    }


def _layout(c: Compilation, key: Key, splits: Splits) -> str:
    value = captured(key[0]).value
    tensor = value[key[1]] if isinstance(value, (tuple, list)) else value
    layout: Layout = c.factored.base[key].form.layout_on(splits.axes, splits.partial).simplify(c.mesh)
    return describe(tensor, layout)


def decision(c: Compilation) -> str:
    """What `schedule` decided: the graph is as it was."""
    chosen = c.schedule
    buckets = [line for line in chosen.bucketed.lines() if isinstance(line.target, Bucket)]
    lines = ["no buckets"]
    if limits := chosen.buckets:
        most = "of any size" if math.isinf(limits.most) else f"of at most {limits.most:.0f} B"
        beside = f", beside {limits.backward:.6g} s of backward" if limits.backward else ""
        lines = [f"buckets {most}{beside}{', apart from what holds others back' if chosen.apart else ''}"]
    for bucket in buckets:
        names = ", ".join(f"%{user.name}" for user in bucket.node.users)
        lines.append(f"  %{bucket.node.name} joins {names}")
    order = ", ".join(f"{WAIT if awaited else ''}%{name}" for name, awaited in chosen.order)
    wrapped = textwrap.wrap(order, 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    wrapped = [line.replace(WAIT, "wait ") for line in wrapped]
    return "\n".join([
        *lines, "order", *wrapped, f"memory {in_bytes(chosen.memory.peak)}, most of it in {chosen.memory.phase}",
        f"time {in_seconds(chosen.seconds)}, and {in_seconds(max(chosen.hidden, 0.0))} of collectives hidden in it",
    ]) + "\n"  # fmt: skip
