"""The network of one expert in a traced graph: two products, and something elementwise between them.

mm(mul(silu(mm(x, w1)), mm(x, w3)), w2)    ->    Network(x, ups=(w1, w3), down=w2, "mul(silu(gate), up)")
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardc.capture.torch_patches.experts import formulas
from shardc.capture.torch_patches.fake_tensors import untraced
from shardc.ir.program import value_of

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class ColumnRange:
    """A part of the columns of a weight: every `step`-th from `first` on, before `last`."""

    first: int
    last: int
    step: int


@dataclass(frozen=True)
class Product:
    """`rows @ weight + bias`, of which `part` is read (None: all). The weight is `[in, out]`."""

    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    part: ColumnRange | None = None


@dataclass(frozen=True)
class Network:
    """One expert, and the nodes between its rows and its result."""

    rows: fx.Node
    ups: tuple[Product, ...]
    down: Product
    activation: tuple[str, str]
    inside: frozenset[fx.Node]

    def alike(self, other: Network) -> bool:
        """Whether both are experts of one kind, for the same rows."""
        mine, others = (*self.ups, self.down), (*other.ups, other.down)
        return (
            self.rows is other.rows
            and self.activation == other.activation
            and len(mine) == len(others)
            and all(map(_similar, mine, others))
        )


def _similar(one: Product, other: Product) -> bool:
    biases = [None if product.bias is None else shape(product.bias) for product in (one, other)]
    return one.part == other.part and shape(one.weight) == shape(other.weight) and biases[0] == biases[1]


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(value_of(node).shape)


def operand(node: fx.Node, place: int = 0) -> Any:
    """One of the arguments of a call."""
    return node.args[place]


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value_of(node), Tensor)


def same_rows(node: fx.Node, seen: set[fx.Node]) -> fx.Node:
    """The value of which a node is a copy, or a view with the same last dim. What lies between is added to `seen`."""
    while node.op == "call_function":
        view = node.target is aten.view.default and shape(node)[-1:] == shape(node.args[0])[-1:]  # type: ignore[arg-type]
        if not view and node.target is not aten.clone.default:
            break
        seen.add(node)
        node = operand(node)
    return node


def product(node: fx.Node, seen: set[fx.Node]) -> Product | None:
    """The product of rows with a weight that a node is."""
    node = same_rows(node, seen)
    match node.target:
        case aten.mm.default:
            rows, weight, bias = node.args[0], node.args[1], None
        case aten.addmm.default if len(node.args) == 3 and not node.kwargs:
            bias, rows, weight = node.args
        case aten.add.Tensor if len(node.args) == 2 and not node.kwargs and all(map(is_tensor, node.args)):
            first, second = node.args
            made, bias = (first, second) if len(shape(second)) == 1 else (second, first)  # type: ignore[arg-type]
            inner = product(made, seen) if len(shape(bias)) == 1 else None  # type: ignore[arg-type]
            if inner is None or inner.bias is not None:
                return None
            seen.add(node)
            return Product(inner.rows, inner.weight, bias)  # type: ignore[arg-type]
        case _:
            return None
    seen.add(node)
    return Product(same_rows(rows, seen), weight, bias)  # type: ignore[arg-type]


def network(node: fx.Node, known: dict[Any, tuple[str, str] | None]) -> Network | None:
    """The expert whose result a node is; None if it is none. `known` are formulas that were found before."""
    seen = set[fx.Node]()
    down = product(node, seen)
    if down is None:
        return None
    between = _Between(seen)
    try:
        made = between(down.rows)
    except LookupError:
        return None
    between.in_order()
    ups = tuple(between.ups)
    if not 1 <= len(ups) <= 2 or any(up.rows is not ups[0].rows for up in ups) or not _one_width(ups):
        return None
    between.graph.output(made)
    found = activation_of(between.graph, len(ups), value_of(down.rows).dtype, known)
    return None if found is None else Network(ups[0].rows, ups, down, found, frozenset(seen))


def activation_of(
    graph: fx.Graph, count: int, dtype: torch.dtype, known: dict[Any, tuple[str, str] | None]
) -> tuple[str, str] | None:
    """What a graph of `count` first products computes as formulas; None if it is not elementwise."""
    key = str(graph), dtype
    if key not in known:
        with untraced(), torch.autocast("cpu", enabled=False):
            try:
                known[key] = formulas(fx.GraphModule({}, graph), count, dtype)
            except Exception:  # (whatever a graph does on small tensors that it does not do on its own)
                known[key] = None
    return known[key]


def _one_width(ups: tuple[Product, ...]) -> bool:
    """Whether the products, or what is read of them, are as wide as one another, and none is cut in a way that a view
    of the weight is not."""
    widths = {len(range(*_range(up))) for up in ups}
    cut = [up for up in ups if up.part is not None]
    if not cut:
        return len(widths) == 1
    if len(cut) != 2 or cut[0].weight is not cut[1].weight or len(widths) > 1:
        return False
    width = shape(cut[0].weight)[1]
    parts = [up.part for up in cut]
    halves = {(0, width // 2, 1), (width // 2, width, 1)}
    turns = {(0, width, 2), (1, width, 2)}
    return {(part.first, part.last, part.step) for part in parts if part} in (halves, turns)


def _range(up: Product) -> tuple[int, int, int]:
    part = up.part
    return (0, shape(up.weight)[1], 1) if part is None else (part.first, part.last, part.step)


class _Between:
    """Copies what stands between the products into a graph of its own, whose placeholders are first products."""

    def __init__(self, seen: set[fx.Node]) -> None:
        self.graph = fx.Graph()
        self.ups: list[Product] = []
        self._places: list[fx.Node] = []
        self._seen = seen
        self._copies: dict[fx.Node, fx.Node] = {}

    def __call__(self, node: fx.Node) -> fx.Node:
        """The copy of a node. Raises LookupError for what is neither a first product nor elementwise."""
        node = same_rows(node, self._seen)
        if node not in self._copies:
            self._copies[node] = self._copied(node)
        return self._copies[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        whole, part = cut(node, self._seen)
        inner = product(whole, self._seen)
        if inner is not None:
            return self._first(Product(inner.rows, inner.weight, inner.bias, part))
        target: Any = node.target
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        if part is not None or not (pointwise or target is aten._to_copy.default):
            raise LookupError(node.name)
        if any(shape(one)[-1:] != shape(node)[-1:] for one in node.all_input_nodes):
            raise LookupError(node.name)
        self._seen.add(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self)
        return self.graph.call_function(target, args, kwargs)

    def _first(self, up: Product) -> fx.Node:
        if up in self.ups:
            return self._places[self.ups.index(up)]
        self.ups.append(up)
        last = self._places[-1] if self._places else None
        with self.graph.inserting_after(last) if last else self.graph.inserting_before():
            self._places.append(self.graph.placeholder(f"value_{len(self.ups)}"))
        return self._places[-1]

    def in_order(self) -> None:
        """Let the first part of a weight come before the second, so that both are one view of it."""
        parts = [up.part for up in self.ups]
        if len(parts) == 2 and parts[0] and parts[1] and parts[0].first > parts[1].first:
            self._places[0].prepend(self._places[1])
            self.ups.reverse()


def cut(node: fx.Node, seen: set[fx.Node]) -> tuple[fx.Node, ColumnRange | None]:
    """What a node cuts along its last dim, and which part it is."""
    last = len(shape(node)) - 1
    if node.target is aten.slice.Tensor and node.args[1] % (last + 1) == last:  # type: ignore[operator]
        source: Any = node.args[0]
        width = shape(source)[-1]
        first, stop, step = slice(*[*node.args[2:], None, None, None][:3]).indices(width)  # type: ignore[misc]
        seen.add(node)
        return same_rows(source, seen), ColumnRange(first, stop if step == 1 else width, step)
    if node.target is operator.getitem and node.args[0].target in (aten.split.Tensor, aten.split_with_sizes.default):  # type: ignore[union-attr]
        several, number = node.args  # type: ignore[misc]
        source, sizes, dim = _split(several)  # type: ignore[arg-type]
        if dim == last:
            first = sum(sizes[:number])  # type: ignore[misc]
            seen.update((node, several))  # type: ignore[arg-type]
            return same_rows(source, seen), ColumnRange(first, first + sizes[number], 1)  # type: ignore[index]
    return node, None


def _split(node: fx.Node) -> tuple[fx.Node, list[int], int]:
    source: Any = node.args[0]
    dim: Any = node.args[2] if len(node.args) > 2 else 0
    sizes = [value.shape[dim] for value in value_of(node)]
    return source, sizes, dim % len(shape(source))
