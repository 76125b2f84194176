"""Factor a program: one walk ties the dims of values through the rules of operators, down to common atoms."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from shardc.errors import RuleError
from shardc.ir.program import Program, Role, frozen, value_of, where
from shardc.ir.splits import Folds
from shardc.rules.custom import given_rule
from shardc.rules.factors.atoms import Atoms, Ref
from shardc.rules.factors.factored import Factor, Factored, Form, Key, Kind, Op, Operand, Parting, Result, Value
from shardc.rules.factors.foldable import foldable
from shardc.rules.notation import Rule, maker_of, parse
from shardc.rules.trial.learned import learned
from shardc.rules.trial.trial import Learned

aten = torch.ops.aten
VIEWS = frozenset(
    {aten.view.default, aten.permute.default, aten.expand.default, aten.unsqueeze.default}
    | {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default}
)


def factor(program: Program, offered: Mapping[str, int] | None = None) -> Factored:
    """Tie the dims of the program through its rules, in one walk, then read off every operator's factors. The axes that
    are `offered`, by their number of ranks, may fold what causal operators read.

    RuleError, with the place in the user's code, if an operator has no rule and none can be learned.
    """
    return _Walk(program, offered or {}).run()


class _Walk:
    def __init__(self, program: Program, offered: Mapping[str, int]) -> None:
        self.program, self.offered = program, offered
        self.atoms = Atoms()
        self.values: dict[fx.Node, Value] = {}
        self.base: dict[Key, Value] = {}
        self.ops: list[Op] = []
        self.rules: dict[Any, tuple[Rule, Learned | None]] = {}
        self.calls: dict[
            Any, tuple[Rule, Learned | None]
        ] = {}  # by the identity of values, since equal layers share theirs
        self.inputs: dict[str, Rule] = {}
        self.ties: dict[tuple[int, ...], list[tuple[str, list[tuple[int, int]]]]] = {}
        self.stuck: dict[tuple[int, frozenset[str]], Rule] = {}

    def run(self) -> Factored:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                text = " ".join(f"d{i}" if n != 1 else "1" for i, n in enumerate(value_of(node).shape))
                if text not in self.inputs:
                    self.inputs[text] = parse(f"-> {text}")
                self._operator(node, self.inputs[text])
            elif node.op == "call_function":
                self._call(node)
        self._tie_gradients()
        self._settle()
        return Factored(self.program, self.atoms, self.ops, self.values, self.base)

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            self.values[node] = self.base[source, index]  # type: ignore[index]
        elif not (node.target in VIEWS and self._view(node)):
            self._operator(node, *self._rule(node))

    def _rule(self, node: fx.Node) -> tuple[Rule, Learned | None]:
        """The rule of a call, and what trial learned if it has no other. Calls of the same form share it."""
        call = id(node.target), frozen(node.args), frozen(node.kwargs), id(value_of(node))
        rule = self.calls.get(call)
        if rule is None:
            rule = self.calls[call] = self._rule_of(node)
        return rule

    def _rule_of(self, node: fx.Node) -> tuple[Rule, Learned | None]:
        form = node.target, repr(fx.map_arg((node.args, dict(node.kwargs)), _form)), repr(_form(node))
        if form in self.rules:
            return self.rules[form]
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
        maker = maker_of(node.target)
        rule = maker(*args, **kwargs) if maker else given_rule(node.target, args, kwargs, value_of(node))
        if rule is not None:
            self.rules[form] = (
                replace(rule),
                None,
            )  # a copy, so that operators with this very object have the same literals
        else:
            answer = _tried(node, args, kwargs)
            self.rules[form] = answer.rule(), answer
        return self.rules[form]

    def _view(self, node: fx.Node) -> bool:
        """Express a view in the refs of its base. False if it cuts across an atom; it then becomes an operator."""
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

    def _operator(self, node: fx.Node, rule: Rule, learned: Learned | None = None) -> None:
        arguments = tensor_arguments(node)
        expected = [names for names in rule.operands if names is not None]
        if len(arguments) != len(expected):
            raise RuleError(
                f"{node.target} has {len(arguments)} tensor operands, its rule {len(expected)} ({where(node)})"
            )
        operands = [Operand(n, self.values[n], names) for n, names in zip(arguments, expected, strict=True)]
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
        self.ops.append(Op(node, self._tie(rule, operands, results), operands, results, learned=learned))

    def _tie(self, rule: Rule, operands: list[Operand], results: list[Result]) -> Rule:
        """Unify the dims that share a factor. A factor whose dims have no common atoms stays whole."""
        items = [*operands, *results]
        key = id(rule), *[result.key[1] for result in results]
        if key not in self.ties:
            self.ties[key] = _ties(items)
        stuck: set[str] = set()
        for name, places in self.ties[key]:
            first, *others = [dim for item, place in places if (dim := items[item].value.dims[place])] or [[]]
            for dim in others:
                # dims of a window may have different sizes and share no atoms; the body assigns rows to ranks
                if name in rule.parts and self._size(first) != self._size(dim):
                    continue
                if not self.atoms.unify(first, dim):
                    stuck.add(name)
        if not stuck:
            return rule
        return self.stuck.setdefault((id(rule), frozenset(stuck)), replace(rule, whole=rule.whole | stuck))

    def _size(self, dim: list[Ref]) -> int:
        return math.prod(self.atoms.size(ref) for ref in dim)

    def _tie_gradients(self) -> None:
        """A gradient has the atoms of its parameter, because it arrives in the parameter's layout."""
        sources = {port.name: node for port, node in zip(self.program.inputs, self.program.placeholders, strict=True)}
        for port, node in zip(self.program.outputs, self.program.results, strict=True):
            if port.role is Role.GRADIENT and node is not None and port.name in sources:
                for one, other in zip(self.values[sources[port.name]].dims, self.values[node].dims, strict=True):
                    self.atoms.unify(one, other)

    def _settle(self) -> None:
        """Set the forms of values and the kinds of operators, now that the atoms are final."""
        sizes, base = self.atoms.sizes, self.base
        self.folds = foldable(self.ops, self.atoms, self.offered)
        forms: dict[object, Form] = {}
        plain: dict[object, Form] = {}
        for value in base.values():  # every dim is one ref, or of size 1
            dims = tuple([sizes(dim[0]) if dim else () for dim in value.dims])
            known = dims, self._folds_of(value)
            if known not in plain:
                plain[known] = self._form_of(value, value, forms)
            value.form = plain[known]
        views: dict[object, Form] = {}
        for value in self.values.values():
            viewed = base[value.key]
            if viewed is not value:
                first = next(
                    (dim[0][0] for dim in viewed.dims if dim), 0
                )  # equal values have equal slots, counted from here
                refs = [tuple([(slot - first, path, sizes((slot, path))) for slot, path in dim]) for dim in value.dims]
                key = viewed.form, *refs
                if key not in views:
                    views[key] = self._form_of(value, viewed, forms)
                value.form = views[key]
        kinds: dict[object, Kind] = {}
        for op in self.ops:
            key = _alike(op)
            if key not in kinds:
                kinds[key] = _kind(op)
            op.kind = kinds[key]

    def _form_of(self, value: Value, base: Value, forms: dict[object, Form]) -> Form:
        """The form of a value: one of `forms`, or a new one that is added to them."""
        leaves, size = self.atoms.leaves, self.atoms.size
        places = {leaf: place for place, leaf in enumerate([leaf for dim in base.dims for leaf in leaves(dim)])}
        dims = tuple([tuple([(places.get(leaf), size(leaf)) for leaf in leaves(dim)]) for dim in value.dims])
        key = dims, tuple([size(leaf) for leaf in places]), self._folds_of(base)
        if key not in forms:
            forms[key] = Form(*key)
        return forms[key]

    def _folds_of(self, base: Value) -> Folds:
        """Which axes may fold the atoms of a base value."""
        if not self.folds:
            return ()
        atoms = [self.atoms.piece(leaf) for dim in base.dims for leaf in self.atoms.leaves(dim)]
        return tuple([self.folds.get(atom, ()) for atom in atoms]) if not self.folds.keys().isdisjoint(atoms) else ()


def _ties(items: list[Operand | Result]) -> list[tuple[str, list[tuple[int, int]]]]:
    """The factors that several dims carry, each with the dims by item and place."""
    dims_of: dict[str, list[tuple[int, int]]] = {}
    for item, entry in enumerate(items):
        for place, name in enumerate(entry.names):
            if name is not None:
                dims_of.setdefault(name, []).append((item, place))
    return [(name, places) for name, places in dims_of.items() if len(places) > 1]


def _alike(op: Op) -> object:
    """A key that is equal for operators of one kind. A rule belongs to one form of call, so it implies literals and
    dtypes."""
    dtype = value_of(op.node).dtype if op.node.op == "placeholder" else None
    return id(op.rule), dtype, *[id(o.value.form) for o in op.operands], *[id(r.value.form) for r in op.results]


def _kind(op: Op) -> Kind:
    dims: dict[str, list[list[int]]] = {}
    folds: dict[str, list[tuple[str, ...]]] = {}
    for item in op.items:
        form = item.value.form
        for name, dim in zip(item.names, form.dims, strict=True):
            if name is not None and dim:
                dims.setdefault(name, []).append([size for _, size in dim])
                if form.folds:
                    here = [() if place is None else form.folds[place] for place, _ in dim]
                    folds[name] = [*map(max, folds.get(name, here), here)]
    factors = [factor for name, sizes in dims.items() for factor in _pieces(op.rule, name, sizes, folds.get(name, []))]
    position = {(factor.name, factor.index): i for i, factor in enumerate(factors)}
    carried = [
        [
            position.get((name, index)) if name is not None else None
            for name, dim in zip(item.names, item.value.form.dims, strict=True)
            for index in range(len(dim))
        ]
        for item in op.items
    ]
    return Kind(factors, carried)


def _pieces(rule: Rule, name: str, dims: list[list[int]], folds: list[tuple[str, ...]]) -> list[Factor]:
    """The atoms of one factor, from the sizes in all dims that carry it. `folds` are those of the atoms; it may be
    empty."""
    sizes, parting, window = dims[0], None, name in rule.parts
    if name in rule.parted:
        parting = Parting(math.prod(sizes), rule.parts.get(name))
    if window:
        sizes = [math.gcd(*(size for dim in dims for size in dim))]
    # a rank's part of an indexed or parted dim must be one chunk, so only the major atom may be split
    chunk = parting is not None or name in rule.indices.values()
    whole = name in rule.whole or (window and any(len(dim) > 1 for dim in dims))
    if not folds or name in rule.indices.values() or (parting and not any(name in v.folds for v in rule.variants)):
        folds = [()] * len(sizes)  # the last two look at positions, and read them only in blocks
    return [
        Factor(name, i, size, whole or (chunk and i > 0), parting, fold)
        for i, (size, fold) in enumerate(zip(sizes, folds, strict=True))
    ]


def _form(node: fx.Node) -> Any:
    """Everything that rules may read of a value."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
        return [one(item) for item in value] if isinstance(value, (list, tuple)) else value  # type: ignore[misc]

    return one(value_of(node))


def _tried(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Learned:
    """What trial learned about an operator without a rule. RuleError if there can be no rule."""
    place = f" ({where(node)})" if where(node) else ""
    if not isinstance(node.target, OpOverload):
        raise RuleError(
            f"{node.target}{place} is not an operator of torch.library (torch wraps one that changes its arguments "
            "like this): write this part of the model with operators, custom ones with mutates_args=()"
        )
    answer = learned(node.target, args, kwargs)
    if answer.refused:
        raise RuleError(
            f"no rule for operator {node.target}{place}, and none can be found: {answer.refused}. Write this part of "
            "the model with operators that have rules, or give it one with shardc.rule"
        )
    return answer


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a call, in order, lists flattened, absent ones left out."""
    nodes: list[fx.Node] = []

    def add(arguments: Iterable[Any]) -> None:
        for argument in arguments:
            if isinstance(argument, fx.Node):
                if isinstance(value_of(argument), torch.Tensor):
                    nodes.append(argument)
            elif isinstance(argument, (list, tuple)):
                add(argument)  # type: ignore[arg-type]

    add(node.args)
    add(node.kwargs.values())
    return nodes
