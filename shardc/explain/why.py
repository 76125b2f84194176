"""Why: answers about the layout of one value, from the problem that was solved.

plan.why("up.weight")                        which operator makes it, who reads it and how, and the next best layout
plan.why_not("up.weight", "f32[64, 64@tp]")  the solver may choose this layout only, and solves again
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from shardc.analysis.conversions import Conversion
from shardc.errors import InfeasibleError, LayoutError, ShardcError
from shardc.explain.assumptions import assumptions
from shardc.explain.chosen_strategy import instead, result_of, splits_text, ways_to_run
from shardc.explain.explanations import Assumption, Conflict, Reader, Why, WhyNot
from shardc.ir.constrain import Dim, parse
from shardc.ir.facts import origin_of
from shardc.ir.layout import Layout, describe
from shardc.ir.program import Port, Role, tensor_of, where
from shardc.ir.splits import Splits, apply
from shardc.planning.compilation import Compilation
from shardc.planning.constraints import demanded_leaves
from shardc.planning.cost_network import Assignment
from shardc.planning.solved import TIME_LIMIT, Solved
from shardc.rules.factors.factored import Key, Op, Value
from shardc.rules.factors.strategy import Strategy, demand, make
from shardc.runtime.mesh.orders import axis_of
from shardc.solver.problem import Problem
from shardc.solver.proof.certificate import Certificate

if TYPE_CHECKING:
    from shardc.explain.conflicts import ConflictFinder

_REUSED = "the plan was reused from other sizes"
Priced = tuple[tuple[Conversion, ...], float]
"""The conversions that an assignment emits, and its seconds of compute."""


@dataclass(eq=False)
class Questions:
    """Answers questions about the plan of a compilation, which sends `conversions` and computes for `compute` seconds.
    `price` gives the conversions that another assignment emits, and its seconds of compute."""

    c: Compilation
    conversions: tuple[Conversion, ...]
    compute: float
    price: Callable[[Assignment], Priced]
    ops: dict[fx.Node, Op] = field(init=False)
    _proof: Solved | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.network, self.assignment, self.solution = self.c.network, self.c.assignment, self.c.solution
        self.mode, self.constraints, self.value_names = self.c.options.mode, self.c.constraints, self.c.titles
        self.ops = {op.node: op for op in self.network.factored.ops}
        self._key_of = {name: key for key, name in self.value_names.items()}

    def why(self, name: str, compare: bool = True) -> Why:
        """Why a value has its layout; without `compare`, no other plan is searched. Raises ShardcError, with near
        names, for a value that is not there."""
        value = self._find(name)
        node = value.key[0]
        op, strategy = self.ops[node], self.assignment.strategies[node]
        layout = self._layout_made(value.key)
        tensor = self.network.class_of(value.key)
        shared = self.assignment.shares.get(value.key, layout)
        demands = tuple(c.label for c in self.constraints if c.key == value.key)
        runner_up, missing = self._runner_up(name, value, compare)
        return Why(
            name, self._text(value, layout), self._maker(op), splits_text(op, strategy),
            float(self.network.options_of(op).compute_of(strategy)), where(node), demands,
            self._steps(value, layout, shared, where(node)) if shared in tensor.index else (),
            self._text(value, shared), tuple(self._readers(value, shared)), runner_up, missing,
            ways_to_run(self.network.options_of(op), strategy),
            () if self.solution is None or not compare else instead(self.network, op, strategy, self._solved),
        )  # fmt: skip

    def why_not(self, name: str, layout: str) -> WhyNot:
        """What another layout of a value would cost, or what forbids it. Raises ShardcError for a value that is not
        there or a search that takes too long, and LayoutError for a layout that the value cannot have."""
        value = self._find(name)
        matches = self._matcher(name, value, layout)
        chosen = self._layout_made(value.key)
        if matches(chosen):
            text = self._text(value, chosen)
            return WhyNot(name, text, text)
        self._solved()
        keep = np.array([matches(splits) for splits in self._domain(value.key)], dtype=bool)
        if not keep.any():
            return WhyNot(name, layout, self._text(value, chosen), conflict=self._obstacle(value, matches))
        return self._forced(name, value, keep, layout)

    def alternatives(self, name: str) -> tuple[str, ...]:
        """The other layouts that a plan may give a value; none where the plan was reused. Raises ShardcError as `why`
        does."""
        value = self._find(name)
        if self.solution is None:
            return ()
        return tuple(
            dict.fromkeys(t for s in self._domain(value.key) if (t := self._text(value, s)) != self._now(value))
        )

    def conflicts(self) -> tuple[Conflict, ...]:
        """The minimal sets of demands and limits that cannot hold together without conversions."""
        conflicts = self.conflict_finder().minimal_conflicts()
        return tuple(Conflict(one.members, tuple(map(self._step, one.path)), one.reason) for one in conflicts)

    def assumes(self) -> tuple[Assumption, ...]:
        """What the plan assumes of the sizes of the inputs."""
        return assumptions(self.network, self.assignment)

    def checked(self) -> float:
        """The lower bound that the plan's certificate proves."""
        return self._solved().checked()

    def certified(self) -> tuple[Problem, Certificate]:
        """The problem that was solved, and the certificate of its solution."""
        return self._solved().certified()

    def conflict_finder(self) -> ConflictFinder:
        """The model of what the user and the network demand, for z3."""
        from shardc.explain.conflicts import ConflictFinder, Demand, in_words  # z3 takes a while to import

        factored, demands = self.network.factored, list[Demand]()
        for constraint in self.constraints:
            leaves: list[tuple[str, ...] | None] = [None] * len(factored.sizes(constraint.key))
            for leaf, axes in demanded_leaves(factored, self.network.mesh, constraint):
                leaves[leaf] = axes
            demands.append(Demand(in_words(constraint), constraint.key, tuple(leaves)))
        return ConflictFinder(self.network, demands)

    def _step(self, op: Op) -> str:
        place = where(op.node)
        return f"{self._name_of((op.node, 0))} ({place})" if place else self._name_of((op.node, 0))

    def _runner_up(self, name: str, value: Value, compare: bool) -> tuple[WhyNot | None, str]:
        """The best plan in which the value has any other layout; or None, and why there is none. That plan is searched
        for only to `compare`."""
        if self.solution is None:
            return None, f"not known: {_REUSED}"
        current = self._text(value, self._layout_made(value.key))
        keep = np.array([self._text(value, splits) != current for splits in self._domain(value.key)], dtype=bool)
        if keep.any():
            return (self._forced(name, value, keep, ""), "") if compare else (None, "not searched for")
        labels = [c.label for c in self.constraints if c.key == value.key]
        if labels:
            return None, f"no other layout is legal with {' and '.join(labels)}"
        alone = "mode='propagate' chose it by the constraints alone, and compared nothing"
        return None, alone if self.mode == "propagate" else ""

    def _forced(self, name: str, value: Value, keep: np.ndarray, layout: str) -> WhyNot:
        """Solve again with only the strategies in `keep` for the value's maker, and compare. Layout "": any of them."""
        solution = self._solved().solution
        chosen = self._text(value, self._layout_made(value.key))
        problem = self.network.problem()
        variable = self.network.variable_of(value.key[0])
        problem.unary[variable] = np.where(keep, problem.unary[variable], np.inf)
        try:
            second = self._solved().again(problem)
        except InfeasibleError as error:
            return WhyNot(name, layout or "anything else", chosen, conflict=str(error))
        except TimeoutError as error:
            raise ShardcError(
                f"{name} as {layout or 'anything else'}: the solver found no plan within {TIME_LIMIT:.0f} CPU-seconds; "
                "ask about a smaller model, or a mesh with fewer axes"
            ) from error
        other = self.network.assignment(second.choice)
        conversions, compute = self.price(other)
        op = self.ops[value.key[0]]
        shape, result = self.network.options_of(op).shape, result_of(op, value.key)
        splits = make(shape, other.strategies[op.node], result, self.network.mesh)
        return WhyNot(
            name, self._text(value, splits), chosen, second.cost - solution.cost, solution.cost,
            compute - self.compute, *self._difference(conversions), proven=second.exact and solution.exact,
        )  # fmt: skip

    def _difference(self, other: Sequence[Conversion]) -> tuple[tuple[Conversion, ...], tuple[Conversion, ...]]:
        """The conversions that only the other plan emits, and those that only this one does."""

        def identity(one: Conversion) -> tuple[object, ...]:
            return one.value, one.kind, one.axis, one.sent, one.phase, one.place

        def beyond(these: Sequence[Conversion], those: Sequence[Conversion]) -> tuple[Conversion, ...]:
            left, extra = Counter(map(identity, those)), list[Conversion]()
            for one in these:
                if left[identity(one)]:
                    left[identity(one)] -= 1
                else:
                    extra.append(one)
            return tuple(extra)

        return beyond(other, self.conversions), beyond(self.conversions, other)

    def _solved(self) -> Solved:
        """The problem and its solution. Raises ShardcError where the plan was reused from other sizes."""
        if self.solution is None:
            raise ShardcError(f"{_REUSED}: no other layout was priced; ask a plan compiled without dynamic=")
        if self._proof is None:
            self._proof = Solved(self.network, self.solution)
        return self._proof

    def _find(self, name: str) -> Value:
        """The value of that name: a parameter, an input, a module's output, or a printed name."""
        program, values = self.network.factored.program, self.network.factored.values
        ports = {port.name: node for port, node in zip(program.inputs, program.placeholders, strict=True)}
        ports |= {alias: ports[first] for alias, first in program.tied.items() if first in ports}
        if name in ports:
            return values[ports[name]]
        outputs: dict[str, fx.Node] = {}
        for node in values:
            path = origin_of(node).module
            while path and node.op != "placeholder" and origin_of(node).phase != "backward":
                outputs[path] = node  # the last one stays
                path = path.rpartition(".")[0]
        if name in outputs:
            return values[outputs[name]]
        printed = name.removeprefix("%")
        if printed in self._key_of:
            return self.network.factored.base[self._key_of[printed]]
        known = list(dict.fromkeys([*ports, *outputs, *self._key_of]))
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ShardcError(
            f'no value is named {name!r}{hint}. Name a value by the path of a parameter or a module, as "input:0", '
            'or as graph("reshard") prints it'
        )

    def _matcher(self, name: str, value: Value, text: str) -> Callable[[Splits], bool]:
        """The test whether a layout is the one that the user wrote. Raises LayoutError if the value cannot have it."""
        mesh, shape = self.network.mesh, self._shape(value)
        if "[" in text:
            layout = Layout.parse(text)
            layout.check(mesh)
            if layout.shape != shape:
                raise LayoutError(f"{text} has shape {layout.shape}; {name} has {shape}: {self._now(value)}")
            goal = layout.simplify(mesh)
            partial = dict(goal.partial)
            return lambda splits: (
                (layout := self._layout(value, splits)).dims == goal.dims and dict(layout.partial) == partial
            )
        dims = self._checked(name, parse(text), shape, self._now(value))

        def test(splits: Splits) -> bool:
            axes = [tuple(a for atom in dim for a in atom.axes) for dim in self._layout(value, splits).dims]
            return not splits.partial and all(w is None or w == h for w, h in zip(dims, axes, strict=True))

        return test

    def _checked(
        self, name: str, dims: tuple[Dim, ...], shape: tuple[int, ...], example: str
    ) -> list[tuple[str, ...] | None]:
        if len(dims) != len(shape):
            raise LayoutError(
                f"{len(dims)} {'entry' if len(dims) == 1 else 'entries'} for {name} of shape {shape}; give one per "
                f"dim, or a layout as plans print it, like {example}"
            )
        names, sizes = self.network.mesh.names, self.network.mesh.ranks
        unknown = next((axis_of(a) for dim in dims for a in dim or () if axis_of(a) not in names), None)
        if unknown is not None:
            raise LayoutError(f"mesh {self.network.mesh} has no axis {unknown!r}; it has {', '.join(names)}")
        return [None if dim is None else tuple(a for a in dim if sizes[a] > 1) for dim in dims]

    def _obstacle(self, value: Value, matches: Callable[[Splits], bool]) -> str:
        """Why no strategy of the operator that makes a value gives it the layout."""
        op = self.ops[value.key[0]]
        index = result_of(op, value.key)
        options = self.network.options_of(op)
        labels = [c.label for c in self.constraints if c.key == value.key]
        if any(matches(make(options.shape, s, index, self.network.mesh)) for s in options.strategies):
            if labels:
                return f"forbidden by {' and '.join(labels)}; drop it, or change it"
            if self.mode == "propagate":
                return "mode='propagate' decides layouts by the constraints alone; ask a plan of mode='auto'"
            written = (port := self._port(op.node)) is not None and port.role is Role.BUFFER
            reason = (
                "it is written in place and so kept whole" if written else "local slices of it cannot give that layout"
            )
            return f"{self._name_of(value.key)} cannot be split like that: {reason}"
        legal = dict.fromkeys(self._text(value, splits) for splits in self._domain(value.key))
        shown = ", ".join(list(legal)[:6]) + (f" and {len(legal) - 6} more" if len(legal) > 6 else "")
        whole = [f for f in op.factors if f.whole and f.size > 1]
        limit = f"; {', '.join(f'{f.name} ({f.size})' for f in whole)} stay whole in its rule" if whole else ""
        return (
            f"{self._maker(op)} ({where(op.node) or 'not in your code'}) makes {shown}{limit}. "
            "To convert its result, call shardc.constrain on it in your code"
        )

    def _domain(self, key: Key) -> Iterator[Splits]:
        """The layouts that the strategies of the operator that makes a value give it."""
        op = self.ops[key[0]]
        shape, mesh = self.network.options_of(op).shape, self.network.mesh
        for strategy in self.network.variables[self.network.variable_of(key[0])].domain:
            assert isinstance(strategy, Strategy)
            yield make(shape, strategy, result_of(op, key), mesh)

    def _layout_made(self, key: Key) -> Splits:
        result, shape = result_of(self.ops[key[0]], key), self.assignment.shapes[key[0]]
        return make(shape, self.assignment.strategies[key[0]], result, self.network.mesh)

    def _layout_read(self, key: Key, shared: Splits, reader: fx.Node) -> Splits:
        """The layout from which a reader converts a value: under a budget, backward reads the kept value."""
        chosen = self.assignment
        if chosen.forward is None or reader in chosen.forward or key[0] not in chosen.forward:
            return shared
        return chosen.regathered.get(key, chosen.kept.get(key, shared))

    def _readers(self, value: Value, shared: Splits) -> Iterator[Reader]:
        key, mesh, program = value.key, self.network.mesh, self.network.factored.program
        for op in self.network.factored.ops:
            for index, operand in enumerate(op.operands):
                if operand.value.key == key:
                    strategy = self.assignment.strategies[op.node]
                    needed = demand(self.assignment.shapes[op.node], strategy, index, mesh)
                    start = self._layout_read(key, shared, op.node)
                    yield self._reader(value, start, needed, self._name_of((op.node, 0)), op.node)
        parameters = {p.name: n for p, n in zip(program.inputs, program.placeholders, strict=True)}
        for index, (port, node) in enumerate(zip(program.outputs, program.results, strict=True)):
            if node is None or self.network.factored.values[node].key != key:
                continue
            gradient = port.role is Role.GRADIENT and port.name in parameters
            if gradient:
                stored = Splits(self.assignment.strategies[parameters[port.name]].split)
                gradient_value = self.network.factored.values[node]
                needed = self.network.gradient_demand(gradient_value, parameters[port.name], stored)
                reader_name = f"gradient of {port.name}"
            else:
                needed, reader_name = self.assignment.outputs[index], f"{port.role.value} {port.name or port.index}"
            yield self._reader(value, shared, needed, reader_name, node, gradient)
        if (port := self._port(key[0])) is not None and port.role is Role.PARAMETER:
            yield from self._gradients(value, port.name)

    def _gradients(self, value: Value, parameter: str) -> Iterator[Reader]:
        """How the gradient of a parameter is converted to the layout of its parameter."""
        program, network = self.network.factored.program, self.network
        for port, node in zip(program.outputs, program.results, strict=True):
            if node is not None and port.role is Role.GRADIENT and port.name == parameter:
                gradient_value = network.factored.values[node]
                base_value = network.factored.base[gradient_value.key]
                stored = Splits(self.assignment.strategies[value.key[0]].split)
                needed = network.gradient_demand(gradient_value, value.key[0], stored)
                shared = self.assignment.shares.get(gradient_value.key, self._layout_made(gradient_value.key))
                steps = self._steps(base_value, shared, needed, where(gradient_value.key[0]), gradient=True)
                reader_name = f"its gradient, from {self._name_of(gradient_value.key)}"
                yield Reader(
                    reader_name, self._text(gradient_value, needed), steps, "backward", where(gradient_value.key[0])
                )

    def _reader(
        self, value: Value, shared: Splits, needed: Splits, reader_name: str, node: fx.Node, gradient: bool = False
    ) -> Reader:
        steps = self._steps(value, shared, needed, where(node), gradient)
        return Reader(reader_name, self._text(value, needed), steps, origin_of(node).phase, where(node))

    def _steps(
        self, value: Value, start: Splits, end: Splits, place: str, gradient: bool = False
    ) -> tuple[Conversion, ...]:
        """The conversions between two layouts of the value. Those of a gradient run in buckets, and cost their
        share."""
        conversions: list[Conversion] = []
        network, mesh = self.network, self.network.mesh
        tensor = network.gradient_class(value.key) if gradient else network.class_of(value.key)
        for step in tensor.path(start, end):
            after = apply(start, step, mesh)
            kind, moved = step.collective, tensor.operand_bytes(start, after, step)
            seconds = tensor.step_seconds(kind, step.axis, moved, bool(step.orders))
            sent = kind.sent(mesh.sizes[step.axis], moved)
            conversions.append(Conversion(kind.name, step.axis, "", sent, seconds, "", place, self._name_of(value.key)))
            start = after
        return tuple(conversions)

    def _layout(self, value: Value, splits: Splits) -> Layout:
        return value.form.layout_on(splits.axes, splits.partial).simplify(self.network.mesh)

    def _text(self, value: Value, splits: Splits) -> str:
        return describe(tensor_of(value.key), self._layout(value, splits))

    def _now(self, value: Value) -> str:
        return self._text(value, self._layout_made(value.key))

    def _shape(self, value: Value) -> tuple[int, ...]:
        return self._layout(value, self._layout_made(value.key)).shape

    def _port(self, node: fx.Node) -> Port | None:
        program = self.network.factored.program
        return next((p for p, n in zip(program.inputs, program.placeholders, strict=True) if n is node), None)

    def _name_of(self, key: Key) -> str:
        return self.value_names.get(key, key[0].name)

    def _maker(self, op: Op) -> str:
        port = self._port(op.node)
        return f"{port.role.value} {port.name}".strip() if port else str(op.node.target)
