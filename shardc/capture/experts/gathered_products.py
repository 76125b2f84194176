"""Finds experts whose weights are gathered for each token: two products of matrices, and something elementwise between.

Values are followed by the names of their dims: those of `ids`, and the features `d` of rows, `o` of first products, `f`
of what is read of these.

bmm(x [t, 1, d], view(up[ids]) [t, d, k o])    ->    [t, 1, k o], of which a view is [t, k, o]
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from shardc.capture.experts.gathered import GatheredExperts, GatheredProduct
from shardc.capture.experts.networks import ColumnRange, activation_of, cut, is_tensor, operand, shape
from shardc.capture.experts.routing import count_of
from shardc.ir.program import value_of

aten: Any = torch.ops.aten

Form = tuple[tuple[str, ...], ...]
"""Per dim the names of what lies in it, the major first; none in a dim of one element."""
_MOVES = (aten.view.default, aten.permute.default, aten.clone.default, aten.expand.default)


def gathered_experts(
    nodes: Sequence[fx.Node], made: Collection[fx.Node], formulas: dict[Any, tuple[str, str] | None]
) -> Iterator[GatheredExperts]:
    """Those of a graph whose results are among `made`."""
    for node in nodes:
        if node.target is aten.bmm.default and any(_gathers(_source(one), 3) for one in node.all_input_nodes):
            try:
                yield _Matcher(node).found(node, made, formulas)
            except LookupError:
                continue


def _source(node: fx.Node) -> fx.Node:
    while node.target in _MOVES:
        node = operand(node)
    return node


def _gathers(node: fx.Node, rank: int) -> bool:
    """Whether a node is `x[ids]`, of a value with so many dims."""
    if node.target is not aten.index.Tensor or len(shape(operand(node))) != rank:
        return False
    (ids, *rest) = operand(node, 1)
    return is_tensor(ids) and not value_of(ids).is_floating_point() and not any(one is not None for one in rest)


class _Matcher:
    """Follows a product of experts back to the first. Raises LookupError for what is something else."""

    def __init__(self, last: fx.Node) -> None:
        self.ids: fx.Node = operand(next(filter(_has_experts, map(_source, last.all_input_nodes))), 1)[0]
        dims = shape(self.ids)
        names = [*(f"t{place}" for place in range(len(dims) - 1)), "k"] if len(dims) > 1 else ["t0"]
        self._sizes = {name: size for name, size in zip(names, dims, strict=False) if size > 1}
        self.lead = tuple(self._sizes)
        self._seen = {last}
        self._rows: tuple[fx.Node, bool] | None = None
        self._ups = list[GatheredProduct]()
        self._graph, self._places = fx.Graph(), list[fx.Node]()
        self._known = dict[fx.Node, tuple[Form, fx.Node]]()

    def found(
        self, last: fx.Node, made: Collection[fx.Node], formulas: dict[Any, tuple[str, str] | None]
    ) -> GatheredExperts:
        first, second = last.args
        at = 1 if _has_experts(_source(second)) else 0  # type: ignore[arg-type]
        hidden, result = self._between(last.args[1 - at])  # type: ignore[arg-type]
        inner = hidden[2 if at else 1]
        if inner not in (("f",), ("o",)):
            raise LookupError
        down, weight = self._weight(last.args[at], inner[0], "d", 1 if at else 2)  # type: ignore[arg-type]
        form = self._product(*((hidden, weight) if at else (weight, hidden)))
        self._graph.output(result)
        dtype = value_of(first).dtype  # type: ignore[arg-type]
        self._in_order()
        activation = activation_of(self._graph, len(self._ups), dtype, formulas)
        if activation is None or self._rows is None or count_of(self.ids) not in range(1, shape(down.weight)[0] + 1):
            raise LookupError
        node, dims, down = self._end(last, form, down, made)
        if sorted(dims) != sorted((*self.lead, "d")):
            raise LookupError
        return GatheredExperts(
            node, dims, self._sizes, self.lead, self._rows[0], self._rows[1] or "k" not in self._sizes, self.ids,
            tuple(self._ups), down, activation, frozenset(self._seen),
        )  # fmt: skip

    def _end(
        self, node: fx.Node, form: Form, down: GatheredProduct, made: Collection[fx.Node]
    ) -> tuple[fx.Node, tuple[str, ...], GatheredProduct]:
        """The last value that is nothing but the experts' results, with their bias if they have one."""
        best = (node, form, down) if node in made else None
        while len(readers := [one for one in node.users if one.users or one.target not in _MOVES]) == 1:
            (node,) = readers
            try:
                if node.target in _MOVES:
                    form = self._moved(node, form)
                else:
                    down = GatheredProduct(down.weight, down.turned, self._bias(node, form, "d", down))
            except LookupError:
                break
            self._seen.add(node)
            best = (node, form, down) if node in made else best
        if best is None:
            raise LookupError
        return best[0], sum(best[1], ()), best[2]

    # dims

    def _named(self, names: Sequence[str], dims: Sequence[int]) -> Form:
        """Which dims a value has with these names, in their order."""
        left, form = list(names), list[tuple[str, ...]]()
        for size in dims:
            here = list[str]()
            while left and math.prod(self._sizes[name] for name in here) < size:
                here.append(left.pop(0))
            if math.prod(self._sizes[name] for name in here) != size:
                raise LookupError
            form.append(tuple(here))
        if left:
            raise LookupError
        return tuple(form)

    def _size(self, name: str, size: int) -> None:
        if size < 2 or self._sizes.setdefault(name, size) != size:
            raise LookupError

    def _moved(self, node: fx.Node, form: Form) -> Form:
        """The dims of a view or copy of what has `form`."""
        if node.target is aten.view.default:
            return self._named(sum(form, ()), shape(node))
        if node.target is aten.permute.default:
            return tuple(form[dim] for dim in operand(node, 1))
        if node.target is aten.expand.default:
            dims, before = shape(node), shape(operand(node))
            if len(dims) != len(before):
                raise LookupError
            added = [n if n != m else 0 for n, m in zip(dims, before, strict=True)]
            if any(n and (n != self._sizes.get("k") or any("k" in names for names in form)) for n in added):
                raise LookupError
            return tuple(("k",) if n else names for n, names in zip(added, form, strict=True))
        return form

    def _along(self, node: fx.Node, root: fx.Node, form: Form) -> Form:
        """The dims of what is made of `root`, which has `form`, by views and copies."""
        if node is root:
            return form
        self._seen.add(node)
        return self._moved(node, self._along(operand(node), root, form))

    def _product(self, first: Form, second: Form) -> Form:
        if first[0] != second[0] or first[2] != second[1]:
            raise LookupError
        return first[0], first[1], second[2]

    # products

    def _weight(self, node: fx.Node, inner: str, outer: str, place: int) -> tuple[GatheredProduct, Form]:
        """A gathered weight, whose dim at `place` is summed over."""
        root = _source(node)
        if not _gathers(root, 3) or operand(root, 1)[0] is not self.ids:
            raise LookupError
        weight = operand(root)
        for turned, names in ((False, (outer, inner)), (True, (inner, outer))):
            sizes = dict(self._sizes)
            try:
                for name, size in zip(names, shape(weight)[1:], strict=True):
                    self._size(name, size)
                form = self._along(node, root, self._named((*self.lead, *names), shape(root)))
                if form[place] == (inner,):
                    self._seen.add(root)
                    return GatheredProduct(weight, turned), form
            except LookupError:
                pass
            self._sizes = sizes
        raise LookupError

    def _bias(self, node: fx.Node, form: Form, name: str, product: GatheredProduct) -> fx.Node:
        """What an addition adds to a product that has `form`."""
        if node.target is not aten.add.Tensor or node.kwargs or not all(map(is_tensor, node.args)) or product.bias:
            raise LookupError
        bias = next((one for one in node.all_input_nodes if _gathers(_source(one), 2)), None)
        root = None if bias is None else _source(bias)
        if bias is None or root is None or operand(root, 1)[0] is not self.ids:
            raise LookupError
        if self._along(bias, root, self._named((*self.lead, name), shape(root))) != form:
            raise LookupError
        self._seen |= {node, root}
        return operand(root)

    def _up(self, node: fx.Node) -> tuple[Form, GatheredProduct] | None:
        """The first product that a node is, with its bias."""
        if node.target in _MOVES:
            inner = self._up(operand(node))
            return None if inner is None else (self._moved(node, inner[0]), inner[1])
        if node.target is aten.add.Tensor and not node.kwargs and all(map(is_tensor, node.args)):
            product = next((one for one in node.all_input_nodes if not _gathers(_source(one), 2)), None)
            inner = self._up(product) if product is not None and len(node.all_input_nodes) == 2 else None
            if (
                inner is None
                or inner[1].bias is not None
                or not any(_gathers(_source(one), 2) for one in node.all_input_nodes)
            ):
                return None
            form, made = inner
            return form, GatheredProduct(made.weight, made.turned, self._bias(node, form, "o", made))
        if node.target is not aten.bmm.default:
            return None
        at = 1 if _has_experts(_source(operand(node, 1))) else 0
        made, weight = self._weight(operand(node, at), "d", "o", 1 if at else 2)
        wanted = (weight[0], (), ("d",)) if at else (weight[0], ("d",), ())
        self._rows_are(operand(node, 1 - at), wanted)
        self._seen.add(node)
        return self._product(*((wanted, weight) if at else (weight, wanted))), made

    def _rows_are(self, node: fx.Node, wanted: Form) -> None:
        """Find the rows of which a node with the form `wanted` is made."""
        root, tokens = node, tuple(name for name in self.lead if name != "k")
        while True:
            for names in {(*tokens, "d"), (*self.lead, "d")}:
                try:
                    if self._along(node, root, self._named(names, shape(root))) == wanted:
                        if self._rows is not None and not _alike(self._rows[0], root):
                            raise LookupError
                        self._rows = self._rows or (root, "k" in names)
                        return
                except LookupError:
                    continue
            if root.target not in _MOVES:
                raise LookupError
            root = operand(root)

    # what stands between

    def _between(self, node: fx.Node) -> tuple[Form, fx.Node]:
        """The dims of a value between the products, and its copy in a graph of which first products are arguments."""
        if node not in self._known:
            self._known[node] = self._copied(node)
        return self._known[node]

    def _copied(self, node: fx.Node) -> tuple[Form, fx.Node]:
        _, part = cut(node, set())
        source = node if part is None else operand(node)
        up = self._up(source if is_tensor(source) else operand(source))  # of what a split has made, the whole
        if up is not None:
            return self._first(up, part)
        if part is not None:
            raise LookupError
        if node.target in _MOVES:
            form, copy = self._between(operand(node))
            return self._moved(node, form), copy
        target: Any = node.target
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        if not (pointwise or target is aten._to_copy.default) or not node.all_input_nodes:
            raise LookupError
        forms = {self._between(one)[0] for one in node.all_input_nodes}
        if len(forms) != 1:
            raise LookupError
        self._seen.add(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: self._between(one)[1])
        return forms.pop(), self._graph.call_function(target, args, kwargs)

    def _first(self, up: tuple[Form, GatheredProduct], part: ColumnRange | None) -> tuple[Form, fx.Node]:
        form, made = up
        if part is not None:
            if form[-1] != ("o",):
                raise LookupError
            self._size("f", len(range(part.first, part.last, part.step)))
            form = (*form[:-1], ("f",))
        product = GatheredProduct(made.weight, made.turned, made.bias, part)
        if product not in self._ups:
            self._ups.append(product)
            last = self._places[-1] if self._places else None
            with self._graph.inserting_after(last) if last else self._graph.inserting_before():
                self._places.append(self._graph.placeholder(f"value_{len(self._ups)}"))
        return form, self._places[self._ups.index(product)]

    def _in_order(self) -> None:
        """Let the first part of a weight come before the second. Raises LookupError where these are no halves."""
        parts = [up.part for up in self._ups]
        if len(parts) > 2 or len({(up.bias is None, up.turned, up.part is None) for up in self._ups}) > 1:
            raise LookupError
        if parts[0] is None:
            return
        wide = self._sizes["o"]
        cuts = {(part.first, part.last, part.step) for part in parts if part}
        halves, turns = {(0, wide // 2, 1), (wide // 2, wide, 1)}, {(0, wide, 2), (1, wide, 2)}
        if cuts not in (halves, turns) or len({(up.weight, up.bias) for up in self._ups}) > 1:
            raise LookupError
        if parts[0].first:
            self._places[0].prepend(self._places[1])
            self._ups.reverse()


def _has_experts(node: fx.Node) -> bool:
    return _gathers(node, 3)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return one is other or (one.target is other.target and one.args == other.args and one.kwargs == other.kwargs)
