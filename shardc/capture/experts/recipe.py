"""How a sum over experts is computed by the operator: its operands, in terms of what a trace has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardc.capture.experts.events import TensorPlace
from shardc.capture.experts.expressions import (
    Call,
    Expression,
    ExpressionWriter,
    TakenTensor,
    evaluate,
    stacked,
    turned,
)
from shardc.capture.experts.networks import ColumnRange, Product, is_tensor, operand, shape
from shardc.capture.experts.routing import ChosenTokens, Gate, GateColumn, Gates, count_of, distinct, is_filled
from shardc.capture.experts.sums import Sum, Term
from shardc.ir.program import value_of
from shardc.runtime.kernels.mixture.fused import experts

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class ExpertScores:
    """What the experts of a token are multiplied by: `[tokens, k]` themselves, a matrix `[tokens, experts]`, or a
    column for each expert, of which each is a product."""

    chosen: Expression | None = None
    matrix: Expression | None = None
    columns: tuple[tuple[Expression, ...], ...] = ()


@dataclass(frozen=True)
class ExpertWeights:
    """One of the products of all experts: `[experts, out, in]`. Of two, where each has its own tensors: those of one
    expert come one after the other."""

    weight: Expression
    bias: Expression | None
    parts: tuple[ColumnRange, ...] = ()


@dataclass(frozen=True)
class ExpertsRecipe:
    """The operands of `shardc::experts`, in the shapes that the model has."""

    rows: Expression
    width: int
    ids: Expression
    bounded: bool
    count: int
    scores: ExpertScores
    factor: float
    ups: tuple[ExpertWeights, ...]
    down: ExpertWeights
    activation: tuple[str, str]
    rest: Expression | None

    def places(self) -> Iterator[TensorPlace]:
        """What it takes from the trace."""
        yield from _places(self)

    def run(self, taken: Callable[[TensorPlace], Tensor], like: Tensor) -> Tensor:
        """The sum, in the form of `like`."""
        known: dict[Any, Any] = {}

        def value(expression: Expression) -> Tensor:
            return evaluate(expression, taken, known)

        x = value(self.rows).reshape(-1, self.width)
        tokens = x.shape[0]
        ids = value(self.ids).reshape(tokens, -1)
        scores = self._scores(value, ids, tokens, x)
        if not self.bounded:
            inside = (ids >= 0) & (ids < self.count)
            ids, scores = torch.where(inside, ids, 0), torch.where(inside, scores, 0)
        up, up_bias = self._up(value)
        down = value(self.down.weight)
        bias = None if self.down.bias is None else value(self.down.bias)
        made = experts(x, ids, scores, up, up_bias, down, bias, *self.activation)
        made = made.reshape(like.shape).to(like.dtype)
        return made if self.rest is None else value(self.rest) + made

    def _scores(self, value: Callable[[Expression], Tensor], ids: Tensor, tokens: int, x: Tensor) -> Tensor:
        given = self.scores
        if given.chosen is not None:
            scores = value(given.chosen).reshape(tokens, -1)
        elif given.matrix is not None:
            scores = _floating(value(given.matrix).reshape(tokens, -1), x).gather(1, self._known(ids))
        elif given.columns:
            each = [
                math.prod((_floating(value(one).reshape(tokens), x) for one in product), start=1)  # type: ignore[type-var]
                for product in given.columns
            ]
            scores = torch.stack(each, 1).gather(1, self._known(ids))  # type: ignore[arg-type]
        else:
            scores = torch.ones_like(ids, dtype=x.dtype)
        return scores if self.factor == 1 else scores * self.factor

    def _known(self, ids: Tensor) -> Tensor:
        return ids if self.bounded else ids.clamp(0, self.count - 1)

    def _up(self, value: Callable[[Expression], Tensor]) -> tuple[Tensor, Tensor | None]:
        """The weight `[experts, g, f, d]` and the bias `[experts, g, f]`."""
        weights = [value(up.weight) for up in self.ups]
        biases = [value(up.bias) for up in self.ups if up.bias is not None]
        return self._halves(weights), self._halves(biases) if biases else None

    def _halves(self, tensors: list[Tensor]) -> Tensor:
        parts = self.ups[0].parts
        if len(tensors) > 1:
            return torch.stack(tensors, 1)
        if not parts:
            return tensors[0].unflatten(0, (self.count, -1))
        if parts[0].step == 1:
            return tensors[0].unflatten(1, (2, -1))
        return tensors[0].unflatten(1, (-1, 2)).transpose(1, 2)


def _floating(x: Tensor, like: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(like.dtype)


def _places(value: Any) -> Iterator[TensorPlace]:
    if isinstance(value, TakenTensor):
        yield value.place
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _places(one)
    elif isinstance(value, (Call, ExpertScores, ExpertWeights, ExpertsRecipe)):
        for one in vars(value).values():
            yield from _places(one)


def recipe(found: Sum, write: ExpressionWriter) -> ExpertsRecipe | None:
    """How to compute a sum; None where it cannot be shown which tokens go to which experts. Raises LookupError where a
    trace does not have an operand."""
    terms = found.terms
    net = terms[0].network
    width = shape(net.rows)[-1]
    tokens = math.prod(shape(net.rows)[:-1])
    ids, shown = _ids(terms, tokens)
    if ids is None or math.prod(shape(found.node)) != tokens * shape(net.down.weight)[1]:
        return None
    if any(term.alone for term in terms) and (math.prod(shape(ids)) != tokens or found.rest is not None):
        return None
    if shape(net.down.weight)[1] != width or len({term.factor for term in terms}) > 1:
        return None
    scores = _scores(terms, ids, shown, tokens, write)
    if scores is None:
        return None
    parts = tuple(up.part for up in net.ups if up.part is not None)
    if len({up.bias is None for up in net.ups}) > 1:
        return None
    return ExpertsRecipe(
        rows=write(net.rows),
        width=width,
        ids=write(ids),
        bounded=0 < count_of(ids) <= len(terms),
        count=len(terms),
        scores=scores,
        factor=terms[0].factor,
        ups=_ups(terms, parts, write),
        down=_weights([term.network.down for term in terms], write),
        activation=net.activation,
        rest=None if found.rest is None else write(found.rest),
    )


def _ups(terms: tuple[Term, ...], parts: tuple[ColumnRange, ...], write: ExpressionWriter) -> tuple[ExpertWeights, ...]:
    several = range(1 if parts else len(terms[0].network.ups))
    each = tuple(_weights([term.network.ups[place] for term in terms], write, parts) for place in several)
    if len(each) > 1 and all(_is_stack(one.weight) for one in each):
        return (_weights([up for term in terms for up in term.network.ups], write),)
    return each


def _is_stack(expression: Expression) -> bool:
    return isinstance(expression, Call) and expression.target is aten.stack.default


def _weights(products: list[Product], write: ExpressionWriter, parts: tuple[ColumnRange, ...] = ()) -> ExpertWeights:
    weight = stacked([turned(write(product.weight)) for product in products])
    biases = [write(product.bias) for product in products if product.bias is not None]
    return ExpertWeights(weight, stacked(biases) if biases else None, parts)


def _ids(terms: tuple[Term, ...], tokens: int) -> tuple[fx.Node | None, list[list[ChosenTokens | None]]]:
    """The ids outside of which every term is zero, and what each of the gates shows."""
    shown = [[Gates(tokens, number).chosen(gate) for gate in term.gates] for number, term in enumerate(terms)]
    every = [{one.ids for one in of_term if one is not None} for of_term in shown]
    common = set.intersection(*every) if every else set[fx.Node]()
    # ids that an exact gate compares come first: those of a matrix may be others
    return (next(iter(common)) if common else None), shown


def _scores(
    terms: tuple[Term, ...], ids: fx.Node, shown: list[list[ChosenTokens | None]], tokens: int, write: ExpressionWriter
) -> ExpertScores | None:
    left = [
        [gate for gate, one in zip(term.gates, of_term, strict=True) if not (one and one.exact and one.ids is ids)]
        for term, of_term in zip(terms, shown, strict=True)
    ]
    single = math.prod(shape(ids)) == tokens
    if all(len(gates) == 1 for gates in left):
        sources = {_matched(gates[0], ids, tokens, number) for number, gates in enumerate(left)}
        source = sources.pop()
        if source is not None and not sources:
            return ExpertScores(chosen=write(source))
    if not (single or distinct(ids)):
        return None
    if all(not gates for gates in left):
        return ExpertScores()
    matrix = _matrix([gates[0] for gates in left], tokens) if all(len(gates) == 1 for gates in left) else None
    if matrix is not None:
        return ExpertScores(matrix=write(matrix))
    return ExpertScores(columns=tuple(tuple(_column(g, n, write) for g in gates) for n, gates in enumerate(left)))


def _column(gate: Gate, number: int, write: ExpressionWriter) -> Expression:
    if isinstance(gate, GateColumn):
        return Call(aten.select.int, (write(gate.node), gate.dim, number))
    return write(gate)


def _matched(gate: Gate, ids: fx.Node, tokens: int, expert: int) -> fx.Node | None:
    """The scores `[tokens, k]` of which a gate is the sum where the ids are the expert's."""
    if isinstance(gate, GateColumn):
        return None
    node = gate
    while node.target in (aten.view.default, aten.clone.default):
        node = operand(node)
    if node.target is aten.sum.dim_IntList:
        dims, rank = node.args[1], len(shape(node.args[0]))  # type: ignore[arg-type]
        if not rank or [dim % rank for dim in dims] != [rank - 1]:  # type: ignore[union-attr]
            return None
        node = operand(node)
    elif math.prod(shape(ids)) != tokens:
        return None
    args: Any = node.args
    if node.target is aten.where.self and is_filled(args[2], 0):
        pairs = [args[:2]]
    elif node.target is aten.mul.Tensor and all(map(is_tensor, args)):
        pairs = [args, args[::-1]]
    else:
        return None
    for mask, scores in pairs:
        one = Gates(tokens, expert)(mask)
        whole = shape(scores) == shape(mask) == shape(node) and math.prod(shape(node)) == math.prod(shape(ids))
        ordered = (
            one is not None and one.exact and one.ids is ids and [kind for kind, _ in one.runs] in (["t", "j"], ["t"])
        )
        if whole and ordered:
            return scores
    return None


def _matrix(gates: list[Gate], tokens: int) -> fx.Node | None:
    """The matrix `[tokens, experts]` of whose columns each gate is one, in their order."""
    sources = set[fx.Node]()
    for number, gate in enumerate(gates):
        if isinstance(gate, GateColumn):
            source, dim = gate.node, gate.dim
        else:
            node = gate
            while node.target in (aten.view.default, aten.clone.default):
                node = operand(node)
            args: Any = node.args
            if (node.target is aten.select.int and args[2] == number) or (
                node.target is aten.slice.Tensor and args[2:4] == (number, number + 1)
            ):
                source, dim = args[0], args[1] % len(shape(args[0]))
            else:
                return None
        dims = shape(source)
        if math.prod(dims[:dim]) != tokens or math.prod(dims[dim:]) != len(gates):
            return None
        sources.add(source)
    return sources.pop() if len(sources) == 1 and value_of(next(iter(sources))).is_floating_point() else None
