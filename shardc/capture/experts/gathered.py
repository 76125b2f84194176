"""Experts whose weights a model gathers for each token, in a traced graph.

h = einsum("td,tkfd->tkf", x, up[ids])      each row [t, k] as the operator computes it of x[t] and ids[t, k]:
y = einsum("tkf,tkdf->tkd", h, down[ids])   down[e] @ activation(up[e] @ x), e the row's expert

Where they stand in a graph, gathered_products.py finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardc.capture.experts.events import TensorPlace
from shardc.capture.experts.expressions import Expression, ExpressionWriter, evaluate, places_in
from shardc.capture.experts.networks import ColumnRange
from shardc.runtime.kernels.mixture.fused import experts


@dataclass(frozen=True)
class GatheredProduct:
    """`weight[ids] @ rows + bias[ids]`, of which `part` is read (None: all). `turned`: the weight is `[experts, in,
    out]`, not `[experts, out, in]`."""

    weight: fx.Node
    turned: bool
    bias: fx.Node | None = None
    part: ColumnRange | None = None


@dataclass(frozen=True)
class GatheredExperts:
    """The node that has the experts' results, and what its dims are."""

    node: fx.Node
    dims: tuple[str, ...]
    """The names of the dims of the results, as they lie there: those of `ids`, and `d`."""
    sizes: dict[str, int]
    lead: tuple[str, ...]
    """The dims of `ids`. The last is `k` if there are several: the choices of a token, or tokens as well."""
    rows: fx.Node
    each: bool
    """Whether `rows` has dim `k`."""
    ids: fx.Node
    ups: tuple[GatheredProduct, ...]
    down: GatheredProduct
    activation: tuple[str, str]
    inside: frozenset[fx.Node]


@dataclass(frozen=True)
class GatheredRecipe:
    """The operands of `shardc::experts`, with a row for each choice."""

    rows: Expression
    each: bool
    ids: Expression
    ups: tuple[tuple[Expression, Expression | None], ...]
    down: tuple[Expression, Expression | None]
    found: GatheredExperts

    def places(self) -> Iterator[TensorPlace]:
        """What it takes from the trace."""
        yield from places_in((self.rows, self.ids, self.ups, self.down))

    def run(self, taken: Callable[[TensorPlace], Tensor], like: Tensor) -> Tensor:
        """The results, in the form of `like`."""
        found, known = self.found, dict[Any, Any]()
        sizes = found.sizes
        ids = evaluate(self.ids, taken, known).reshape(-1, 1)
        x = evaluate(self.rows, taken, known).reshape(-1, sizes["d"])
        if not self.each:
            x = x.unsqueeze(1).expand(-1, sizes["k"], -1).reshape(-1, sizes["d"])
        weights = [self._weight(one, found.ups[place].turned, taken, known) for place, (one, _) in enumerate(self.ups)]
        biases = [evaluate(one, taken, known) for _, one in self.ups if one is not None]
        down, down_bias = self.down
        made = experts(
            x, ids, torch.ones_like(ids, dtype=x.dtype), self._joined(weights),
            self._joined(biases) if biases else None,
            self._weight(down, found.down.turned, taken, known),
            None if down_bias is None else evaluate(down_bias, taken, known), *found.activation,
        )  # fmt: skip
        order = [*found.lead, "d"]
        made = made.reshape([sizes[name] for name in order]).permute([order.index(name) for name in found.dims])
        return made.reshape(like.shape).to(like.dtype)

    def _weight(self, of: Expression, turned: bool, taken: Callable[[TensorPlace], Tensor], known: Any) -> Tensor:
        weight = evaluate(of, taken, known)
        return weight.transpose(1, 2) if turned else weight

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        """`[experts, g, f, ...]`"""
        part = self.found.ups[0].part
        if part is None:
            return torch.stack(tensors, 1)
        return tensors[0].unflatten(1, (2, -1)) if part.step == 1 else tensors[0].unflatten(1, (-1, 2)).transpose(1, 2)


def gathered_recipe(found: GatheredExperts, write: ExpressionWriter) -> GatheredRecipe:
    """How to compute what was found. Raises LookupError where a trace does not have an operand."""

    def written(product: GatheredProduct) -> tuple[Expression, Expression | None]:
        return write(product.weight), None if product.bias is None else write(product.bias)

    several = found.ups[:1] if found.ups[0].part is not None else found.ups
    return GatheredRecipe(
        write(found.rows), found.each, write(found.ids), tuple(map(written, several)), written(found.down), found
    )
