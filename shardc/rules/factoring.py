"""A program seen through its rules: every operator with the atoms that its operands and results share.

Views are no operators here. A value that is a view keeps refs into its base value, so a strategy's demand on a view
is a demand on the base, and the solver never meets a view."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from shardc.errors import RuleError
from shardc.graph import Program, Role, value_of, where
from shardc.layout import Atom, Layout
from shardc.rules.atoms import Atoms, Ref
from shardc.rules.custom import given_rule
from shardc.rules.learned import learned
from shardc.rules.notation import Rule, Send, maker_of, parse
from shardc.rules.trial import Learned

aten = torch.ops.aten
VIEWS = frozenset(
    {aten.view.default, aten.permute.default, aten.expand.default, aten.unsqueeze.default}
    | {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default}
)
Key = tuple[fx.Node, int]


@dataclass
class Value:
    """A tensor of the program: `key` is the base value it views (its own if it is no view), `dims` its refs per dim."""

    key: Key
    dims: list[list[Ref]]


@dataclass
class Operand:
    """One tensor argument of an operator: the graph node passed, its value, and the factor of each of its dims."""

    node: fx.Node
    value: Value
    names: tuple[str | None, ...]


@dataclass
class Result:
    """One tensor that an operator makes."""

    key: Key
    value: Value
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class Parting:
    """How a parted factor may be split: the `size` of the dim it stands for, the numbers of parts that one axis may
    make of it (None: any, over any axes), and what the body sends then."""

    size: int
    parts: frozenset[int] | None
    sends: tuple[Send, ...]


@dataclass(frozen=True)
class Factor:
    """An atom of an operator: piece number `index` of the factor called `name` in its rule."""

    name: str
    index: int
    size: int
    whole: bool
    parting: Parting | None = None


@dataclass
class Op:
    """An operator (or placeholder) with its rule, and its factors as atoms; `learned` if trial found the rule."""

    node: fx.Node
    rule: Rule
    operands: list[Operand]
    results: list[Result]
    factors: list[Factor] = field(default_factory=list[Factor])
    learned: Learned | None = None


@dataclass
class Factored:
    """`ops` in graph order, placeholders first; `values` for every tensor node; `base` the refs of every base value."""

    program: Program
    atoms: Atoms
    ops: list[Op]
    values: dict[fx.Node, Value]
    base: dict[Key, Value]

    def __post_init__(self) -> None:
        # the atoms are final
        self._leaves: dict[Key, list[Ref]] = {}
        self._sizes: dict[Key, tuple[int, ...]] = {}
        self._pieces: dict[Ref, list[tuple[Ref, int]]] = {}

    def leaves(self, key: Key) -> list[Ref]:
        """The atoms of a base value, in memory order."""
        if key not in self._leaves:
            self._leaves[key] = [leaf for dim in self.base[key].dims for ref in dim for leaf, _ in self.pieces(ref)]
        return self._leaves[key]

    def sizes(self, key: Key) -> tuple[int, ...]:
        if key not in self._sizes:
            refs = [ref for dim in self.base[key].dims for ref in dim]
            self._sizes[key] = tuple([size for ref in refs for _, size in self.pieces(ref)])
        return self._sizes[key]

    def pieces(self, ref: Ref) -> list[tuple[Ref, int]]:
        """The atoms that a ref consists of, major to minor, with their sizes."""
        if ref not in self._pieces:
            self._pieces[ref] = [(leaf, self.atoms.size(leaf)) for leaf in self.atoms.leaves([ref])]
        return self._pieces[ref]


def factor(program: Program) -> Factored:
    """Walk the program once, tie dims through the rules, then read off every operator's factors."""
    return _Walk(program).run()


class _Walk:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.atoms = Atoms()
        self.values: dict[fx.Node, Value] = {}
        self.base: dict[Key, Value] = {}
        self.ops: list[Op] = []
        self.rules: dict[Any, tuple[Rule, Learned | None]] = {}

    def run(self) -> Factored:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                text = " ".join(f"d{i}" if n != 1 else "1" for i, n in enumerate(value_of(node).shape))
                self._operator(node, parse(f"-> {text}"))
            elif node.op == "call_function":
                self._call(node)
        self._tie_gradients()
        for op in self.ops:
            op.factors = self._factors(op)
        return Factored(self.program, self.atoms, self.ops, self.values, self.base)

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            self.values[node] = self.base[source, index]  # type: ignore[index]
        elif not (node.target in VIEWS and self._view(node)):
            self._operator(node, *self._rule(node))

    def _rule(self, node: fx.Node) -> tuple[Rule, Learned | None]:
        """The rule of a call, and how it was found if by trial. Calls of the same form have the same."""
        form = node.target, repr(fx.map_arg((node.args, dict(node.kwargs)), _form)), repr(_form(node))
        if form in self.rules:
            return self.rules[form]
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
        maker = maker_of(node.target)
        rule = maker(*args, **kwargs) if maker else given_rule(node.target, args, kwargs, value_of(node))
        if rule is not None:
            self.rules[form] = rule, None
        else:
            found = _tried(node, args, kwargs)
            self.rules[form] = found.rule(), found
        return self.rules[form]

    def _view(self, node: fx.Node) -> bool:
        """Express a view in the refs of what it views; False when it cuts across an atom (it becomes an operator)."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        value, shape = self.values[source], value_of(node).shape
        if node.target is aten.permute.default:
            dims = [value.dims[d] for d in node.args[1]]  # type: ignore[union-attr]
        elif node.target is aten.expand.default:
            added = len(shape) - len(value.dims)
            dims = [
                value.dims[i - added] if i >= added and value.dims[i - added] else self._dim(int(size))
                for i, size in enumerate(shape)
            ]
        else:
            dims = self.atoms.regroup([ref for dim in value.dims for ref in dim], shape)
        if dims is None:
            return False
        self.values[node] = Value(value.key, dims)
        return True

    def _dim(self, size: int) -> list[Ref]:
        return [self.atoms.new(size)] if size != 1 else []

    def _operator(self, node: fx.Node, rule: Rule, found: Learned | None = None) -> None:
        given = list(tensor_arguments(node))
        expected = [names for names in rule.operands if names is not None]
        if len(given) != len(expected):
            raise RuleError(f"{node.target} has {len(given)} tensor operands, its rule {len(expected)} ({where(node)})")
        operands = [Operand(n, self.values[n], names) for n, names in zip(given, expected, strict=True)]
        outputs = value_of(node)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        results: list[Result] = []
        for index, (names, output) in enumerate(zip(rule.results, outputs, strict=True)):
            if names is not None and isinstance(output, torch.Tensor):
                if len(names) != output.dim():
                    raise RuleError(f"{node.target}: result {index} has shape {tuple(output.shape)}, its rule {names}")
                value = Value((node, index), [self._dim(int(size)) for size in output.shape])
                self.base[node, index] = value
                results.append(Result((node, index), value, names))
        if isinstance(value_of(node), torch.Tensor) and results:
            self.values[node] = results[0].value
        self.ops.append(Op(node, self._tie(rule, operands, results), operands, results, learned=found))

    def _tie(self, rule: Rule, operands: list[Operand], results: list[Result]) -> Rule:
        """Unify the dims that share a factor; a factor whose dims admit no common atoms stays whole."""
        first: dict[str, list[Ref]] = {}
        stuck: set[str] = set()
        for item in (*operands, *results):
            for name, dim in zip(item.names, item.value.dims, strict=True):
                if name is None or not dim:
                    continue
                if name in first and not self._unify(rule, name, first[name], dim):
                    stuck.add(name)
                first.setdefault(name, dim)
        if not stuck:
            return rule
        return replace(rule, whole=rule.whole | stuck)

    def _unify(self, rule: Rule, name: str, one: list[Ref], other: list[Ref]) -> bool:
        """The dims of a window have different sizes and share no atoms: its body sees to what goes where."""
        if name in rule.parts:
            sizes = [math.prod(self.atoms.size(ref) for ref in dim) for dim in (one, other)]
            if sizes[0] != sizes[1]:
                return True
        return self.atoms.unify(one, other)

    def _tie_gradients(self) -> None:
        """A gradient has the atoms of its parameter, because it arrives in the parameter's layout."""
        sources = {port.name: node for port, node in zip(self.program.inputs, self.program.placeholders, strict=True)}
        for port, node in zip(self.program.outputs, self.program.results, strict=True):
            if port.role is Role.GRADIENT and node is not None and port.name in sources:
                for one, other in zip(self.values[sources[port.name]].dims, self.values[node].dims, strict=True):
                    self.atoms.unify(one, other)

    def _factors(self, op: Op) -> list[Factor]:
        leaves: dict[str, list[list[Ref]]] = {}
        for item in (*op.operands, *op.results):
            for name, dim in zip(item.names, item.value.dims, strict=True):
                if name is not None and dim:
                    leaves.setdefault(name, []).append(self.atoms.leaves(dim))
        return [factor for name, dims in leaves.items() for factor in self._pieces(op.rule, name, dims)]

    def _pieces(self, rule: Rule, name: str, dims: list[list[Ref]]) -> list[Factor]:
        """The atoms of one factor, from all dims that carry it."""
        sizes = [self.atoms.size(ref) for ref in dims[0]]
        parting, window = None, name in rule.parts
        if name in rule.parted:
            parting = Parting(math.prod(sizes), rule.parts.get(name), rule.sends.get(name, ()))
        if window:
            sizes = [math.gcd(*(self.atoms.size(ref) for dim in dims for ref in dim))]
        # a rank's part of an indexed or parted dim must be one chunk, so only the major atom may be split
        chunk = parting is not None or name in rule.indices.values()
        whole = name in rule.whole or (window and any(len(dim) > 1 for dim in dims))
        return [Factor(name, i, size, whole or (chunk and i > 0), parting) for i, size in enumerate(sizes)]


def _form(node: fx.Node) -> Any:
    """All that rules ask of a value."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
        return [one(item) for item in value] if isinstance(value, (list, tuple)) else value  # type: ignore[misc]

    return one(value_of(node))


def _tried(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Learned:
    """The rule found by trial for an operator that has none; RuleError where there can be none."""
    place = f" ({where(node)})" if where(node) else ""
    if not isinstance(node.target, OpOverload):
        raise RuleError(
            f"{node.target}{place} is no operator of torch.library (one that changes its arguments is wrapped like "
            "this): write this part of the model with operators, custom ones with mutates_args=()"
        )
    found = learned(node.target, args, kwargs)
    if found.refused:
        raise RuleError(
            f"no rule for operator {node.target}{place}, and none can be found: {found.refused}. Write this part of "
            "the model with operators that have rules, or give it one with shardc.rule"
        )
    return found


def tensor_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The tensor operands of a call, in order, lists flattened, absent ones left out."""

    def walk(argument: Any) -> Iterator[fx.Node]:
        if isinstance(argument, fx.Node):
            if isinstance(value_of(argument), torch.Tensor):
                yield argument
        elif isinstance(argument, (list, tuple)):
            for item in argument:  # type: ignore[misc]
                yield from walk(item)

    for argument in (*node.args, *node.kwargs.values()):
        yield from walk(argument)


def carried(factored: Factored, item: Operand | Result, factors: list[Factor]) -> list[tuple[Ref, int | None]]:
    """Per leaf of an operand or result, in order: the leaf's ref and the position of its factor in `factors`."""
    position = {(f.name, f.index): i for i, f in enumerate(factors)}
    found: list[tuple[Ref, int | None]] = []
    for name, dim in zip(item.names, item.value.dims, strict=True):
        for index, leaf in enumerate([leaf for ref in dim for leaf, _ in factored.pieces(ref)]):
            found.append((leaf, position.get((name, index)) if name is not None else None))
    return found


def layout_of(
    factored: Factored,
    value: Value,
    held: Mapping[Ref, tuple[str, ...]],
    partial: tuple[tuple[str, str], ...] = (),
) -> Layout:
    """The layout of a value whose leaves are split as `held` says."""
    dims = [
        tuple([(size, held.get(leaf, ())) for ref in dim for leaf, size in factored.pieces(ref)]) for dim in value.dims
    ]
    return _layout(tuple(dims), partial)


@lru_cache(maxsize=1 << 16)
def _layout(
    dims: tuple[tuple[tuple[int, tuple[str, ...]], ...], ...], partial: tuple[tuple[str, str], ...]
) -> Layout:  # fmt: skip
    """Equal layouts are one object: a deep model has few, and what is derived from one is derived once."""
    return Layout(tuple(tuple(Atom(*atom) for atom in dim) or (Atom(1),) for dim in dims), partial)
