"""The cost network under a memory budget: it also chooses what forward keeps for backward.

Without a budget, backward reads what forward made, in whatever layouts there are. With one, every value of forward that
backward reads has two more variables:

    operator of forward     a strategy, and whether backward runs it again
    share of a value        a layout, for its readers in forward
    kept value              a layout in which it is kept until backward, or made again there; or that it is gone
    share in backward       a layout, for its readers in backward: a value that is kept split is gathered again once

An operator that runs again reads what is kept of its operands, and pays its time and their conversions a second time.
(Chen et al. 2016, "Training deep nets with sublinear memory cost"; Korthikanti et al. 2022, "Reducing activation
recomputation in large transformer models".) Besides costs, the network records how many bytes every choice holds, from
which operator to which: the memory terms (`shardc/solver/loads.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from shardc.cost.conversion import TensorClass
from shardc.cost.memory import NO_STATES, States
from shardc.ir.program import Port, Role
from shardc.ir.splits import Splits
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.planning.run_order import RunOrder
from shardc.planning.variables import Domain, name_of
from shardc.rules.factors.factored import Key, Op, Value
from shardc.rules.factors.strategy import Shape, Strategy, workspace
from shardc.solver.loads import Load, Loads
from shardc.solver.problem import Array, zeros

Source = tuple[int, np.ndarray]
"""A variable, and per value of it the layout that it stands for."""
GONE = Splits((), (("gone", ""),))
"""The value of a kept value's variable that says that it is not kept."""


@dataclass(eq=False)
class RecomputeNetwork(CostNetwork):
    """The network under a memory budget. With `recompute`, operators of forward may run again in backward. `states`
    says how many bytes the optimizer holds for an element of a parameter that trains."""

    recompute: bool = True
    states: States = NO_STATES
    _loads: list[Load] = field(default_factory=list[Load])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.schedule = RunOrder(self.factored)
        self.trained = self.factored.program.trained
        self._reader = 0  # the position of the reader that is being connected
        self._kept_variables: dict[Key, Source] = {}
        self._regathered_variables: dict[Key, Source] = {}
        self._arrays_derived: dict[object, tuple[Array, object]] = {}

    def widened(self, narrow: RecomputeNetwork, choice: Sequence[int]) -> list[int]:
        """A choice of this network from one of `narrow`, in which nothing runs again. Values of kept values that
        `narrow` lacks are gone; shares that it lacks take the layout that costs least beside the other choices."""
        known = {variable.name: x for variable, x in zip(narrow.variables, choice, strict=True)}
        values = [known.get(variable.name, len(variable.domain) - 1) for variable in self.variables]
        missing = {v for v, variable in enumerate(self.variables) if variable.name not in known}
        beside: dict[int, Array] = {}
        for one, other, table in self._edges:
            if one in missing and other not in missing:
                beside[one] = beside.get(one, 0.0) + table[:, values[other]]
            elif other in missing and one not in missing:
                beside[other] = beside.get(other, 0.0) + table[values[one]]
        for v, seconds in beside.items():
            if self.variables[v].domain[-1] != GONE:
                values[v] = int(seconds.argmin())
        return values

    def memory_terms(self) -> Loads:
        """The bytes that every choice holds, over the positions of the run order."""
        return Loads(self.schedule.length, self._loads)

    def assignment(self, choice: list[int]) -> Assignment:
        """The meaning of a solution, with what forward keeps for backward."""
        chosen = super().assignment(choice)
        chosen.forward = frozenset(self.schedule.forward)
        for key, (variable, _) in self._kept_variables.items():
            layouts = self.class_of(key).layouts
            if choice[variable] < len(layouts):
                chosen.kept[key] = layouts[choice[variable]]
        for key, (variable, _) in self._regathered_variables.items():
            chosen.regathered[key] = self.class_of(key).layouts[choice[variable]]
        return chosen

    def _add_op(self, op: Op, port: Port | None, frozen: bool) -> Domain:
        self._reader = self.schedule.position[op.node]
        domain = super()._add_op(op, port, frozen)
        variable = self._op_variable[op.node]
        if domain.strategies and domain.strategies[-1].again:
            for operand, demanded in zip(op.operands, domain.operands, strict=True):
                self._connect_again(op, operand.value.key, variable, demanded)
        self._hold_workspace(op, variable, domain)
        for result in op.results:
            self._hold_result(result.key, variable, port)
        return domain

    def _hold_workspace(self, op: Op, variable: int, domain: Domain) -> None:
        """Record the workspace of every strategy: it is held while the operator runs, and again while it runs again."""
        options = self.options_of(op)
        shape = options.shape
        if not shape.workspace and not options.rings and not any(one.workspace for one in shape.variants):
            return
        once = self._derived("workspace", (options, domain), lambda: self._workspaces(shape, domain))
        self._hold(variable, None, once, self._reader, self._reader)
        if domain.strategies and domain.strategies[-1].again:

            def repeated() -> Array:
                return np.where([strategy.again for strategy in domain.strategies], once, 0.0)

            position = self.schedule.rerun[op.node]
            self._hold(variable, None, self._derived("workspace again", (once,), repeated), position, position)

    def _workspaces(self, shape: Shape, domain: Domain) -> Array:
        return np.array([float(workspace(shape, strategy, self.mesh)) for strategy in domain.strategies])

    def _domain(self, op: Op, port: Port | None, frozen: bool) -> Domain:
        once = super()._domain(op, port, frozen)
        if not (self.recompute and op.node in self.schedule.rerun):
            return once
        if id(once) not in self._domains:
            self._domains[id(once)] = Domain(
                [*once.strategies, *(strategy._replace(again=True) for strategy in once.strategies)],
                np.concatenate([once.seconds, 2.0 * once.seconds]),
                [self._intern(np.tile(layouts, 2)) for layouts in once.operands],
                [self._intern(np.tile(layouts, 2)) for layouts in once.results],
            )
        return self._domains[id(once)]

    def _crosses(self, key: Key) -> bool:
        """Whether backward reads a value of forward, or may read it to run an operator again."""
        return bool(self._readers(key)[1]) or (self.recompute and key in self.schedule.reread)

    def _readers(self, key: Key) -> tuple[list[int], list[int]]:
        return self.schedule.readers.get(key, ([], []))

    def _hold_result(self, key: Key, variable: int, port: Port | None) -> None:
        """Record the memory of a result. A parameter is held throughout, with its optimizer's state; another value
        until its last reader, or until it was converted to the layout that its readers share."""
        here, (_, layouts) = self._reader, self._source[key]
        tensor = self.class_of(key)
        sizes = self._bytes_of(tensor, layouts)
        if port is not None and port.role is not Role.TANGENT:
            if port.role is Role.PARAMETER:
                states = self.states(tensor.itemsize) if port.name in self.trained else 0.0
                factor = 1.0 + states / tensor.itemsize
                sizes = self._derived(factor, (sizes,), lambda: sizes * factor)
            self._hold(variable, None, sizes, 0, self.schedule.length - 1)
            return
        forward, backward = self._readers(key)
        in_forward = key[0] in self.schedule.forward
        readers = forward if in_forward else backward
        shared = (in_forward and forward and self._crosses(key)) or len(readers) > 1
        last = max(readers, default=here)
        self._hold(
            variable, None, sizes, here, here if shared and port is None else last
        )  # from then on the shared layout is held

    def _add_shares(self, op: Op, key: Key, users: int, port: Port | None) -> None:
        if port is not None and port.role is not Role.PARAMETER:
            return
        forward, backward = self._readers(key)
        in_forward = port is not None or op.node in self.schedule.forward
        crosses = in_forward and self._crosses(key)
        readers = forward if in_forward else backward
        maker = self._source[key]
        if readers and (crosses or len(readers) > 1):
            variable = self._share_variable[key] = self._add_share(key)
            tensor, (source, layouts) = self.class_of(key), maker
            if port is None:
                self._hold(variable, None, tensor.bytes, self._reader + 1, max(readers))
            else:  # the parameter itself is held throughout
                copies = self._copies(tensor, layouts, self._source[key][1])
                self._hold(source, variable, copies, min(readers), max(readers))
        if crosses:
            self._add_kept(key, maker, port)

    def _add_kept(self, key: Key, maker: Source, port: Port | None) -> None:
        """Add the variable of a kept value: its layout in backward, or (the last entry of the domain) that it is
        gone."""
        tensor, backward = self.class_of(key), self._readers(key)[1]
        layouts: list[Splits] = [*tensor.layouts] if backward else [*tensor.layouts, GONE]
        variable = self._variable(f"{name_of(key)} kept", layouts, zeros(len(layouts)))
        every = self._intern(np.arange(len(tensor.layouts)))
        self._kept_variables[key] = variable, every
        source, maker_layouts = maker
        again = self._runs_again(source)
        gone = not backward

        def again_only() -> Array:
            table = tensor.seconds[np.ix_(maker_layouts, every)].copy()
            table[: len(maker_layouts) // 2] = 0.0
            return _with_gone(table, gone, 0.0)

        if key in self._share_variable:
            shared, shared_layouts = self._source[key]

            def from_share() -> Array:
                return _with_gone(tensor.seconds[shared_layouts], gone, 0.0)

            table = self._derived(("shared", gone), (tensor, shared_layouts), from_share)
            self._edges.append((shared, variable, table))
            if again:
                table = self._derived(("again", gone), (tensor, maker_layouts), again_only)
                self._edges.append((source, variable, table))
        else:

            def from_maker() -> Array:
                return _with_gone(tensor.seconds[np.ix_(maker_layouts, every)], gone, 0.0)

            table = self._derived(("made", gone), (tensor, maker_layouts), from_maker)
            self._edges.append((source, variable, table))
        self._hold_kept(key, maker, port, gone)
        if backward and len(backward) + (self.recompute and key in self.schedule.reread) > 1:
            self._regather(key, variable)

    def _runs_again(self, variable: int) -> bool:
        domain = self.variables[variable].domain
        return bool(domain) and isinstance(domain[-1], Strategy) and domain[-1].again

    def _regather(self, key: Key, kept: int) -> None:
        tensor, backward = self.class_of(key), self._readers(key)[1]
        variable = self._variable(f"{name_of(key)} shared in backward", tensor.layouts, zeros(len(tensor.layouts)))
        every = self._kept_variables[key][1]
        self._edges.append((kept, variable, tensor.seconds))
        first = min(*backward, self.schedule.reread.get(key, backward)[0])
        self._hold(kept, variable, self._copies(tensor, every, every), first, max(backward))
        self._regathered_variables[key] = variable, every

    def _hold_kept(self, key: Key, maker: Source, port: Port | None, gone: bool) -> None:
        """Record the memory of a kept value, until its last reader: from its last reader in forward on, or, where it
        is made again, from its first reader in backward on."""
        tensor, (variable, every), (source, maker_layouts) = self.class_of(key), self._kept_variables[key], maker
        forward, backward = self._readers(key)
        last = max(forward, default=self._reader)
        first, end = self.schedule.rerun.get(key[0], 0), max([*backward, *self.schedule.reread.get(key, ())])
        if port is not None:  # the parameter itself is held throughout
            copies = self._copies(tensor, maker_layouts, every)
            held = self._derived(("copies", gone), (copies,), lambda: _with_gone(copies, gone, 0.0))
            self._hold(source, variable, held, last + 1, end)
        elif self._runs_again(source):
            once = len(maker_layouts) // 2

            def rows(kept: bool) -> Array:
                table = np.zeros((len(maker_layouts), len(every)))
                table[slice(once) if kept else slice(once, None)] = tensor.bytes
                return _with_gone(table, gone, 0.0)

            parts = (tensor, maker_layouts)
            self._hold(source, variable, self._derived(("kept", gone), parts, lambda: rows(True)), last + 1, end)
            self._hold(source, variable, self._derived(("repeated", gone), parts, lambda: rows(False)), first, end)
        else:
            sizes = self._derived(("sizes", gone), (tensor,), lambda: np.append(tensor.bytes, [0.0] * int(gone)))
            self._hold(variable, None, sizes, last + 1, end)

    def _source_of(self, key: Key) -> Source:
        """Readers in backward read the kept value."""
        if self._reader > self.schedule.border and key in self._kept_variables:
            return self._regathered_variables.get(key, self._kept_variables[key])
        return self._source[key]

    def _connect(self, key: Key, variable: int, demanded: np.ndarray) -> None:
        super()._connect(key, variable, demanded)
        source, layouts = self._source_of(key)
        self._hold(source, variable, self._copies(self.class_of(key), layouts, demanded), self._reader, self._reader)

    def _connect_again(self, op: Op, key: Key, variable: int, demanded: np.ndarray) -> None:
        """Charge an operator that runs again for its operands: it reads the kept values, as backward does."""
        source, layouts = self._regathered_variables.get(key) or self._kept_variables.get(key, self._source[key])
        tensor, once = self.class_of(key), len(demanded) // 2
        gone = len(self.variables[source].domain) > len(layouts)

        def table() -> Array:
            seconds = tensor.seconds[np.ix_(layouts, demanded)].copy()
            seconds = np.vstack([seconds, np.full((int(gone), len(demanded)), np.inf)])
            seconds[:, :once] = 0.0
            return seconds

        def copies() -> Array:
            table = self._copies(tensor, layouts, demanded).copy()
            table[:, :once] = 0.0
            return np.vstack([table, np.zeros((int(gone), len(demanded)))])

        parts, at = (tensor, layouts, demanded), self.schedule.rerun[op.node]
        self._edges.append((source, variable, self._derived(("read again", gone), parts, table)))
        self._hold(source, variable, self._derived(("copied again", gone), parts, copies), at, at)

    def _add_outputs(self) -> None:
        self._reader = self.schedule.border
        super()._add_outputs()
        for index, variable in self._output_variable.items():
            node = self.factored.program.results[index]
            assert node is not None
            tensor = self.class_of(self.factored.values[node].key)
            domain = self.variables[variable].domain
            sizes = np.array([tensor.local_bytes(splits) for splits in domain])  # type: ignore[arg-type]
            self._hold(variable, None, sizes, self.schedule.border + 1, self.schedule.length - 1)

    def _tie_gradient(self, value: Value, parameter: fx.Node) -> None:
        """Charge and record a gradient: it is held to the end, in the layout of its parameter."""
        before, self._reader = self._reader, self.schedule.position[value.key[0]]
        super()._tie_gradient(value, parameter)
        tensor = self.class_of(value.key)
        sizes = self._bytes_of(tensor, self._gradient_layouts(value, parameter))
        self._hold(self._op_variable[parameter], None, sizes, self._reader + 1, self.schedule.length - 1)
        self._reader = before

    def _copies(self, tensor: TensorClass, start: np.ndarray, end: np.ndarray) -> Array:
        """The bytes of a copy in layout `end`, 0 where `start` is that layout."""
        return self._derived("copies", (tensor, start, end), lambda: np.where(
            start[:, None] == end[None, :], 0.0, tensor.bytes[end]))  # fmt: skip

    def _bytes_of(self, tensor: TensorClass, layouts: np.ndarray) -> Array:
        return self._derived("bytes", (tensor, layouts), lambda: tensor.bytes[layouts])

    def _derived(self, what: object, parts: tuple[object, ...], make: Callable[[], Array]) -> Array:
        """The array that `make` computes from these parts; the same object every time."""
        key = (what, *map(id, parts))
        if key not in self._arrays_derived:
            self._arrays_derived[key] = make(), parts
        return self._arrays_derived[key][0]

    def _hold(self, one: int, other: int | None, table: Array, start: int, end: int) -> None:
        if other is not None and other < one:
            one, other, table = other, one, self._derived("turned", (table,), lambda: np.ascontiguousarray(table.T))
        self._loads.append(Load(one, other, table, start, end))


def _with_gone(table: Array, gone: bool, cost: float) -> Array:
    """The table with one more column, for a value that is not kept."""
    return np.hstack([table, np.full((len(table), 1), cost)]) if gone else table
