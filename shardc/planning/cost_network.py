"""From a factored program to the cost network: its variables, their costs, and what the edges charge.

operator, placeholder   a strategy   costs its compute
share of a value        a layout     costs nothing; the edge from its producer charges what all its readers share
output                  a layout     whole on every rank, or any that a DTensor stores

minimise  sum of compute  +  sum over edges of the cheapest conversion between what is made and what is demanded
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import fx

from shardc.cost.buckets import Buckets, Sharing
from shardc.cost.conversion import TensorClass
from shardc.cost.hardware import Hardware
from shardc.cost.step_graph import StepGraph
from shardc.ir.facts import origin_of
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Role, tensor_of, value_of
from shardc.ir.splits import Folds, Splits
from shardc.planning.gradient_sums import late_sums, summed_bytes, takes_sums
from shardc.planning.offers.listed import Atoms, listed_layouts
from shardc.planning.offers.near import Offers, graph_of
from shardc.planning.offers.ports import Accepts, PortLayouts
from shardc.planning.ring_offers import RingOffers
from shardc.planning.same_draws import ties
from shardc.planning.strategies import OperatorOptions
from shardc.planning.variables import Domain, Variable, base_demand, name_of
from shardc.rules.factors.factored import Factored, Key, Kind, Op, Value
from shardc.rules.factors.strategy import Shape, Side, Strategy, shape_of
from shardc.solver.problem import Problem, zeros


@dataclass
class Assignment:
    """A solution: a strategy per operator, the layout that the readers of a value share, the layout of every output.

    Under a memory budget, `kept` and `regathered` are, per value of forward that backward reads, the layout in which it
    is kept until then (or made again), and the layout that its readers in backward share. `forward` is what runs in
    forward. Without a budget it is None: backward reads whatever forward made.
    """

    strategies: dict[fx.Node, Strategy]
    shapes: dict[fx.Node, Shape]
    shares: dict[Key, Splits]
    outputs: dict[int, Splits]
    kept: dict[Key, Splits] = field(default_factory=dict[Key, Splits])
    regathered: dict[Key, Splits] = field(default_factory=dict[Key, Splits])
    forward: frozenset[fx.Node] | None = None


@dataclass(frozen=True)
class LayoutDemands:
    """What is demanded of layouts. `accepts` says which layouts of base values constraints allow. Every rank gets all
    of an output that has at most `whole_bytes`, and its part of a larger one. Of the `wishes` for a value, the first
    that any strategy fulfils is granted."""

    accepts: Mapping[Key, Accepts] = field(default_factory=dict[Key, Accepts])
    whole_bytes: float = math.inf
    wishes: Mapping[Key, Sequence[Accepts]] = field(default_factory=dict[Key, Sequence[Accepts]])

    def whole(self, output: torch.Tensor) -> bool:
        """Whether every rank gets all of an output."""
        return output.nbytes <= self.whole_bytes


@dataclass(eq=False)
class CostNetwork:
    """Builds the problem for one program on one mesh; see `LayoutDemands`. If `balanced`, it counts attention as if
    sequences were folded (see `shardc/planning/folding.py`). With `offers`, it has a part of all strategies."""

    factored: Factored
    mesh: Mesh
    device: Hardware
    demands: LayoutDemands
    variables: list[Variable] = field(default_factory=list[Variable])
    balanced: bool = False
    offers: Offers | None = None

    def __post_init__(self) -> None:
        self._classes: dict[tuple[tuple[int, ...], int, Folds], TensorClass] = {}
        self._class_of: dict[Key, TensorClass] = {}
        self._gradient_classes: dict[tuple[tuple[int, ...], torch.dtype, Folds], TensorClass] = {}
        self._shapes: dict[Kind, Shape] = {}
        self._options: dict[fx.Node, OperatorOptions] = {}
        self._distinct: dict[object, OperatorOptions] = {}
        self._tables: dict[object, np.ndarray] = {}
        self._arrays: dict[bytes, np.ndarray] = {}
        self._domains: dict[object, Domain] = {}
        self._ports = PortLayouts(self.mesh)
        self._graphs: dict[Atoms, StepGraph] = {}
        self._listed: dict[Atoms, list[Splits]] = {}
        self._demands: dict[object, np.ndarray] = {}
        others = {r for op in self.factored.ops for r in op.rule.reductions.values()} - {"sum"}
        self._reductions = ("sum", *sorted(others))
        # per base value: its variable and, for each value of that variable, the layout it stands for
        self._source: dict[Key, tuple[int, np.ndarray]] = {}
        self._edges: list[tuple[int, int, np.ndarray]] = []
        self._op_variable: dict[fx.Node, int] = {}
        self._takes_gradient: set[int] = set()
        self._share_variable: dict[Key, int] = {}
        self._output_variable: dict[int, int] = {}

    def share(self, other: CostNetwork) -> None:
        """Use the strategies and conversions that another network of the same program on the same mesh has computed,
        also where the one offers layouts that the other does not, or only one of them is balanced."""
        if self.offers is not None and self.factored is not other.factored:
            return  # their layouts are those of other atoms
        self._classes, self._distinct = other._classes, other._distinct
        self._tables, self._arrays = other._tables, other._arrays
        self._domains, self._ports, self._demands = other._domains, other._ports, other._demands
        self._graphs, self._listed = other._graphs, other._listed
        if self.factored is other.factored:
            self._class_of = other._class_of
            alike = self.balanced == other.balanced
            self._options = other._options if alike else {
                node: options for node, options in other._options.items() if options.shape.band is None
            }  # fmt: skip
            if alike or self._beneath == other._beneath:
                self._gradient_classes = other._gradient_classes

    def problem(self) -> Problem:
        """The problem for the solver, as a copy that the caller may change."""
        return Problem([*self._whole.unary], {**self._whole.edges}, self._whole.names)

    @cached_property
    def _whole(self) -> Problem:
        problem = Problem([v.unary for v in self.variables], {}, [v.name for v in self.variables])
        for edge in self._edges:
            problem.add_edge(*edge)
        return problem

    def assignment(self, choice: list[int]) -> Assignment:
        """The meaning of a solution: `choice` holds an index into every variable's domain."""

        def pick(variable: int) -> Strategy | Splits:
            return self.variables[variable].domain[choice[variable]]

        return Assignment(
            {node: pick(v) for node, v in self._op_variable.items()},  # type: ignore[misc]
            {op.node: self.options_of(op).shape for op in self.factored.ops},
            {key: pick(v) for key, v in self._share_variable.items()},  # type: ignore[misc]
            {index: pick(v) for index, v in self._output_variable.items()},  # type: ignore[misc]
        )

    def variable_of(self, node: fx.Node) -> int:
        """The variable of an operator or placeholder."""
        return self._op_variable[node]

    def tensor_class(self, sizes: tuple[int, ...], itemsize: int, folds: Folds = ()) -> TensorClass:
        """The layouts of tensors with atoms of these sizes and elements of `itemsize` bytes, and their conversions."""
        key = sizes, itemsize, folds
        if key not in self._classes:
            asked = sizes, itemsize, self._reductions, self.mesh, self.device
            self._classes[key] = TensorClass(*asked, folds=folds, among=self._among(sizes, folds))
        return self._classes[key]

    def class_of(self, key: Key) -> TensorClass:
        """The tensor class of a base value."""
        if key not in self._class_of:
            sizes, folds = self.factored.sizes(key), self.factored.folds(key)
            self._class_of[key] = self.tensor_class(sizes, tensor_of(key).element_size(), folds)
        return self._class_of[key]

    def gradient_class(self, key: Key) -> TensorClass:
        """The tensor class of a base value that is a gradient: collectives that convert it to the layout of its
        parameter run in buckets, and cost less."""
        sizes, dtype, folds = self.factored.sizes(key), tensor_of(key).dtype, self.factored.folds(key)
        if (sizes, dtype, folds) not in self._gradient_classes:
            tensor_class = TensorClass(
                sizes, dtype.itemsize, self._reductions, self.mesh, self.device, self._sharing[dtype], folds,
                self._among(sizes, folds),
            )  # fmt: skip
            self._gradient_classes[sizes, dtype, folds] = tensor_class
        return self._gradient_classes[sizes, dtype, folds]

    def _among(self, sizes: tuple[int, ...], folds: Folds) -> Callable[[], StepGraph] | None:
        """What gives the layouts of tensors of these sizes, where not all are offered."""
        if self.offers is None:
            return None

        def graph() -> StepGraph:
            if not self._listed:
                self._listed.update(listed_layouts(self))
            if (sizes, folds) not in self._graphs:
                listed = self._listed.get((sizes, folds), ())
                self._graphs[sizes, folds] = graph_of(sizes, self.mesh, self._reductions, folds, listed)
            return self._graphs[sizes, folds]

        return graph

    @cached_property
    def _rings(self) -> RingOffers:
        return RingOffers(self.factored)

    @cached_property
    def _sharing(self) -> dict[torch.dtype, Sharing]:
        """By dtype, the gradients that share collectives in buckets, and the seconds a byte of backward that hide them
        (behind micro-batches, none). The model assumes that all of a dtype are in buckets, and that every operator of
        backward is split as far as it can be."""
        sizes = summed_bytes(self.factored)
        total = sum(map(sum, sizes.values()))
        backward = self._beneath if total and self.factored.program.turns == 1 else 0.0
        buckets, beneath = Buckets(self.mesh, self.device, backward=backward), backward / total if total else 0.0
        return {dtype: Sharing(buckets, tuple(bytes_of_each), beneath) for dtype, bytes_of_each in sizes.items()}

    @cached_property
    def _beneath(self) -> float:
        """Seconds that backward takes at least."""
        backward = [op for op in self.factored.ops if origin_of(op.node).phase == "backward"]
        return sum(self.options_of(op).least for op in backward)

    def build(self) -> None:
        """Make the variables and edges."""
        program, users = self.factored.program, self._users()
        ports = dict(zip(program.placeholders, program.inputs, strict=True))
        mutated = {port.name for port in program.outputs if port.role is Role.MUTATION}
        for op in self.factored.ops:
            port = ports.get(op.node)
            frozen = port is not None and port.role is Role.BUFFER and port.name in mutated
            self._add_op(op, port, frozen)
            for result in op.results:
                self._add_shares(op, result.key, users[result.key], port)
        self._add_outputs()
        for tied in (ties, late_sums):
            self._edges += tied(self.factored, self._op_variable, self.variables, self.options_of)

    def _add_shares(self, op: Op, key: Key, users: int, port: Port | None) -> None:
        """Add the variables between a value and its readers: a share, where several read it."""
        if users > 1 and (port is None or port.role is Role.PARAMETER):
            self._share_variable[key] = self._add_share(key)

    def _users(self) -> Counter[Key]:
        users = Counter(operand.value.key for op in self.factored.ops for operand in op.operands)
        users.update(self.factored.values[node].key for node in self.factored.program.results if node is not None)
        return users

    def options_of(self, op: Op) -> OperatorOptions:
        """The strategies of an operator; operators of one shape that are offered the same rings share them."""
        if op.node not in self._options:
            if op.kind not in self._shapes:
                shape = shape_of(op)
                if self.balanced and shape.band is not None:
                    shape = replace(shape, band=replace(shape.band, balanced=True))
                self._shapes[op.kind] = shape
            shape = self._shapes[op.kind]
            self._options[op.node] = self._options_of(op, shape, self._rings.offered(op, shape))
        return self._options[op.node]

    def _options_of(self, op: Op, shape: Shape, rings: frozenset[str]) -> OperatorOptions:
        offers = None if any(result.key in self.demands.accepts for result in op.results) else self.offers
        key = shape, rings, offers and offers.middle(op.node, shape), offers is None
        if key not in self._distinct:

            def classes(sides: tuple[Side, ...]) -> list[TensorClass]:
                return [self.tensor_class(side.sizes, side.itemsize, side.folds) for side in sides]

            operands, results = classes(shape.operands), classes(shape.results)
            asked = shape, self.mesh, self.device, operands, results, rings, offers
            self._distinct[key] = OperatorOptions(*asked, middle=key[2])
        return self._distinct[key]

    def _variable(self, name: str, domain: list[Strategy] | list[Splits], unary: np.ndarray) -> int:
        self.variables.append(Variable(name, domain, unary))
        return len(self.variables) - 1

    def _add_op(self, op: Op, port: Port | None, frozen: bool) -> Domain:
        domain = self._domain(op, port, frozen)
        self._op_variable[op.node] = variable = self._variable(op.node.name, domain.strategies, domain.seconds)
        if takes_sums(op.node) or (port is not None and port.role is Role.PARAMETER):
            self._takes_gradient.add(variable)
        for operand, demanded in zip(op.operands, domain.operands, strict=True):
            self._connect(operand.value.key, variable, demanded)
        for result, layouts in zip(op.results, domain.results, strict=True):
            self._source[result.key] = variable, layouts
        return domain

    def _domain(self, op: Op, port: Port | None, frozen: bool) -> Domain:
        options = self.options_of(op)
        keep = self._kept(op, options, port, frozen)
        identity = id(options), None if keep is None else tuple(keep)
        if identity in self._domains:
            return self._domains[identity]
        if keep is None:
            domain = Domain(options.strategies, options.seconds, options.operand_layouts, options.result_layouts)
        else:
            domain = Domain(
                [options.strategies[i] for i in keep],
                options.seconds[keep],
                [self._intern(layouts[keep]) for layouts in options.operand_layouts],
                [self._intern(layouts[keep]) for layouts in options.result_layouts],
            )
        self._domains[identity] = domain
        return domain

    def _kept(self, op: Op, options: OperatorOptions, port: Port | None, frozen: bool) -> list[int] | None:
        """The strategies whose results every constraint accepts; None for all of them."""
        if port is None and not self.demands.accepts and not self.demands.wishes:
            return None
        tests: list[tuple[int, Accepts]] = [
            (k, self.demands.accepts[result.key])
            for k, result in enumerate(op.results)
            if result.key in self.demands.accepts
        ]
        if frozen:
            tests.append((0, lambda splits: not any(splits.axes)))
        if port is not None and (
            port.role is Role.PARAMETER
            or (port.role is Role.TANGENT and not self.demands.whole(tensor_of(op.results[0].key)))
        ):
            tests.append((0, self._ports.storable(op.results[0].value)))
        elif port is not None:
            tests.append((0, self._ports.sliceable(op.results[0].value)))
        if not tests and not self.demands.wishes:
            return None

        def passing(among: Sequence[int], k: int, ok: Accepts) -> list[int]:
            return [i for i in among if ok(options.result_classes[k].layouts[options.result_layouts[k][i]])]

        keep = list(range(len(options.strategies)))
        for k, ok in tests:
            keep = passing(keep, k, ok)
        for k, result in enumerate(op.results):
            granted = (passing(keep, k, wish) for wish in self.demands.wishes.get(result.key, ()))
            keep = next(filter(None, granted), keep)
        return keep

    def _intern(self, array: np.ndarray) -> np.ndarray:
        return self._arrays.setdefault(array.tobytes(), array)

    def _connect(self, key: Key, variable: int, demanded: np.ndarray) -> None:
        """Charge `variable` for converting a base value to the layouts that it demands. Conversions of gradients, which
        parameters and casts of sums demand, run in buckets."""
        source, layouts = self._source_of(key)
        is_gradient = variable in self._takes_gradient and not takes_sums(key[0])  # else its sum was converted before
        tensor = self.gradient_class(key) if is_gradient else self.class_of(key)
        identity = (id(tensor), id(layouts), id(demanded))
        if identity not in self._tables:
            turns = self.factored.program.turns if is_gradient else 1  # a gradient goes once a step
            self._tables[identity] = tensor.seconds[np.ix_(layouts, demanded)] / turns
        self._edges.append((source, variable, self._tables[identity]))

    def _source_of(self, key: Key) -> tuple[int, np.ndarray]:
        """The variable that readers of a base value are charged against, and the layouts of its values."""
        return self._source[key]

    def _add_share(self, key: Key) -> int:
        tensor = self.class_of(key)
        every = self._intern(np.arange(len(tensor.layouts)))
        variable = self._variable(f"{name_of(key)} shared", tensor.layouts, zeros(len(tensor.layouts)))
        self._connect(key, variable, every)
        self._source[key] = variable, every
        return variable

    def _add_outputs(self) -> None:
        program = self.factored.program
        parameters = {p.name: n for p, n in zip(program.inputs, program.placeholders, strict=True)}
        for index, (port, node) in enumerate(zip(program.outputs, program.results, strict=True)):
            if node is None:
                continue
            value = self.factored.values[node]
            if port.role is Role.GRADIENT and port.name in parameters:
                self._tie_gradient(value, parameters[port.name])
                continue
            tensor = self.class_of(value.key)
            whole = port.role is not Role.OUTPUT or self.demands.whole(value_of(node))
            storable = self._ports.storable(value)
            domain = [Splits(((),) * len(tensor.sizes))] if whole else [s for s in tensor.layouts if storable(s)]
            variable = self._variable(f"output {index}", domain, zeros(len(domain)))
            self._connect(value.key, variable, self._intern(np.array([tensor.index[s] for s in domain])))
            self._output_variable[index] = variable

    def _tie_gradient(self, value: Value, parameter: fx.Node) -> None:
        """Charge a parameter for converting its gradient to its layout."""
        self._connect(value.key, self._op_variable[parameter], self._gradient_layouts(value, parameter))

    def _gradient_layouts(self, value: Value, parameter: fx.Node) -> np.ndarray:
        tensor, stored = self.class_of(value.key), self.variables[self._op_variable[parameter]].domain
        key = id(tensor), id(stored), value.form
        if key not in self._demands:
            layouts = [Splits(s.split) for s in stored]  # type: ignore[union-attr]
            demanded = [tensor.index[self.gradient_demand(value, parameter, splits)] for splits in layouts]
            self._demands[key] = self._intern(np.array(demanded))
        return self._demands[key]

    def gradient_demand(self, value: Value, parameter: fx.Node, stored: Splits) -> Splits:
        """The layout of the gradient's base value when the parameter is stored as `stored`."""
        return base_demand(value, stored.axes)
