"""Plans in which attention, experts or products run a given variant, chosen by the solver from what is left of its
domain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch._ops import OpOverload

from shardc.cost.hardware import Hardware
from shardc.ir.program import Port
from shardc.planning.cost_network import CostNetwork
from shardc.planning.ring_offers import RingOffers
from shardc.planning.strategies import OperatorOptions
from shardc.rules.factors.factored import Op
from shardc.rules.factors.strategy import Strategy

ATTENTION = (torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
EXPERTS = (torch.ops.shardc.experts.default, torch.ops.shardc.experts_backward.default)
EXPERT_CALLS = {"": "shardc.experts.default(", "in_parts": "experts_in_parts(", "exchanged": "experts_exchanged("}
"""How generated code calls each variant of the experts."""
Accepts = Callable[[Mapping[str, tuple[str, ...]], str], bool]
"""Whether a strategy may be chosen, by the axes that split each factor, and the name of the variant."""


def attention(accepts: Accepts) -> AbstractContextManager[None]:
    """Every attention has a strategy that `accepts`, in forward and in backward."""
    return _forced(ATTENTION, accepts)


def experts(variant: str) -> AbstractContextManager[None]:
    """All experts run that variant, in forward and in backward."""
    return _forced(EXPERTS, lambda _, name: name == variant)


@contextmanager
def products(*variants: str) -> Generator[None]:
    """All products that can run one of the variants do (`""` is the plain one), whatever it costs and whatever hides
    anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hardware, "hiding", lambda _, mesh: tuple(name for name, ways in mesh.axes if ways > 1))
        patch.setattr(OperatorOptions, "_faster", lambda _, rings: [*range(len(rings.strategies))])
        patch.setattr(RingOffers, "offered", lambda _, op, shape: frozenset(shape.rings))
        with _forced(PRODUCTS, lambda _, name: name in variants, where_it_can=True):
            yield


@contextmanager
def _forced(operators: Collection[OpOverload], accepts: Accepts, *, where_it_can: bool = False) -> Generator[None]:
    """With `where_it_can`, an operator of which no strategy is accepted has all of them."""
    kept = CostNetwork._kept

    def fewer(self: CostNetwork, op: Op, options: OperatorOptions, port: Port | None, frozen: bool) -> list[int] | None:
        keep = kept(self, op, options, port, frozen)
        if op.node.target not in operators:
            return keep
        among = range(len(options.strategies)) if keep is None else keep
        accepted = [
            place
            for place in among
            if accepts(_split(op, options.strategies[place]), options.strategies[place].variant)
        ]
        return accepted or ([*among] if where_it_can else [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostNetwork, "_kept", fewer)
        yield


def _split(op: Op, strategy: Strategy) -> dict[str, tuple[str, ...]]:
    return {factor.name: axes for factor, axes in zip(op.factors, strategy.split, strict=True) if axes}


def ring(*axes: str) -> Accepts:
    """A ring over just these axes; what the others do is free, but for other splits of queries and keys."""
    return lambda split, variant: variant == "ring" and set(split["r"]) == set(axes)


def hybrid(around: str, heads: str) -> Accepts:
    """A ring over one axis, and heads split over another, whether heads of keys or of a group that shares them."""
    return lambda split, variant: ring(around)(split, variant) and (heads,) in (split.get("h"), split.get("g"))


def gathered(*axes: str) -> Accepts:
    """Queries split over just these axes, and all keys on every rank."""
    return lambda split, _: set(split.get("r", ())) == set(axes) and "s" not in split


def split_keys(*axes: str) -> Accepts:
    """Keys split over just these axes, and all queries on every rank."""
    return lambda split, _: set(split.get("s", ())) == set(axes) and "r" not in split


def ulysses(*axes: str) -> Accepts:
    """Heads split over just these axes, those of keys or those of a group that shares them."""
    return lambda split, _: {*split.get("h", ()), *split.get("g", ())} == set(axes) and not {"r", "s"} & split.keys()
